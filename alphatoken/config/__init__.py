"""The fields of a run, each with its reason, and how YAML files and overrides become them.

A new key is a field with a description in `sections` (or `run`, `preference`); `--help`, the
nearest-name errors and the resolved config.yaml follow from it. A resumed run may have another
value of it only if the field is marked with `sections.MAY_CHANGE`. Checks of several fields are
validators beside them. Names that can be registered from outside are tables with what each name
needs of a run (`policies`, `objectives`, `estimators`).
"""
