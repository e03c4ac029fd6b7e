"""What is minimised, on rows and on pairs.

A new preference objective is a function and an entry in `pair_losses.PAIR_OBJECTIVES` and one in
`config.objectives.OBJECTIVE_TRAITS`, or a call of `pair_losses.register_objective` from outside;
see docs/extending.md.
"""
