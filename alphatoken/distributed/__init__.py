"""Ranks, messages, DeepSpeed and its shards; knows parameters, not models.

A new message is a named function in `collectives` whose docstring gives its volume. Whatever
depends on how DeepSpeed stores things goes into `zero3` and nowhere else.
"""
