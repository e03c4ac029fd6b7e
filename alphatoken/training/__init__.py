"""The loop: one optimizer step, what is reported of it, and being stopped.

A new number is a `declare` in `metrics.py` and an entry in the dict where it is computed (a sum
over ranks: an `add` and a line in `statistics.StepStatistics.reduce`); then `make metrics`.
"""
