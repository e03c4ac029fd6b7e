"""From what is known of tokens to their weights in the loss, in a micro-batch and over a whole
step.

A new policy is an entry in `policy.POLICIES`; see docs/extending.md.
"""
