"""What a run will need before it starts: memory, messages and FLOPs.

A new estimator brings its costs along, as `costs.base.ScoringCost`; see docs/extending.md.
"""
