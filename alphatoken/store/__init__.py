"""Numbers of every response token of a dataset, on disk by row: losses of a reference, values.

A new kind of numbers is a `RowsFolder` with columns of its own; what it was made from belongs into
its settings, so that it is never read for something else.
"""
