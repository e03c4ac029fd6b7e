"""Estimator `ghost`: signals of the last layers' linears, contracted with the held-out ones and the
drift."""
