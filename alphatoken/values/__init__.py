"""What a token is worth: the algebra, the estimators, `score_tokens`.

A new estimator is a subclass of `estimator.Scorer` registered in `registry.ESTIMATORS`; see
docs/extending.md.
"""
