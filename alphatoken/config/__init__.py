"""The fields of a run, each with its reason, and how YAML files and overrides become them.

A new key is a field with a description in `sections` (or `run`, `preference`); `--help`, the
nearest-name errors and the resolved config.yaml follow from it. Checks of several fields are
validators beside them.
"""
