"""What a run will need before it starts: memory, messages and FLOPs.

A new estimator brings its costs along; see docs/extending.md.
"""
