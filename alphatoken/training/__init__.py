"""The loop: one optimizer step, what is reported of it, and being stopped.

A new number is one `add` where it is computed and one entry in the table of metrics.
"""
