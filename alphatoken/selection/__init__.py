"""From what is known of tokens to their weights in the loss, in a micro-batch and over a whole
step.

A new policy is an entry in `policy.SORT_KEYS` and one in `config.policies.POLICY_TRAITS`, or a call
of `policy.register_policy` from outside; see docs/extending.md.
"""
