"""What is minimised, on rows and on pairs.

A new preference objective is an entry in `preference.PAIR_OBJECTIVES` and one in
`config.objectives.OBJECTIVE_TRAITS`, or a call of `preference.register_objective` from outside; see
docs/extending.md.
"""
