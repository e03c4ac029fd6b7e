"""Estimator `exact`: the first-order effect of every token, by one forward-mode pass."""
