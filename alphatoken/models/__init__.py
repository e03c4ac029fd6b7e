"""Any causal language model as body, layers, norm and head: registry, loading, and the head's
losses.

A new model class is one entry in `architectures.ARCHITECTURES`; see docs/extending.md.
"""
