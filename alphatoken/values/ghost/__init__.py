"""Estimator `ghost`, the paper's: signals of the last layers' linears, contracted with the held-out
ones and the drift.

To follow a value from beginning to end, read in this order:

- `scorer`: drives; `refresh` takes in held-out rows, `score` values a batch.
- `tower`: runs the last layers forward and backward, apart from the training graph.
- `signals`: what each linear saw, (h, d), and d mixed by the attention band.
- `contract`: the equation, one linear at a time, and the sum over linears.
- `held_out`: the held-out signals (h_v, d_v), and G in the form each linear needs.
"""
