"""What is minimised, on rows and on pairs.

A new preference objective is a pure function in `pair_losses` and an entry in
`preference.OBJECTIVES`; see docs/extending.md.
"""
