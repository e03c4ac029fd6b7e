"""What a token is worth: the algebra, the estimators, `score_tokens`.

A new estimator is a subclass of `estimator.Scorer` with an entry in `config.estimators`, or from
outside a call of `registry.register_estimator`; see docs/extending.md.
"""
