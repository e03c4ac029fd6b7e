"""What a model can do: its losses of texts, choices among answers, generated answers, and programs
that are run.

A task (`tasks`, `code`) makes its items from rows before weights are read, has a `Judge` run the
model on every rank, and keeps numbers by item, so that any two evaluations of the same items can be
compared pair by pair (`comparison`). What a task measures is in `measures`, programs run in
`sandbox`. To add a task, add its traits to `config.evaluation.TASKS`, its class to
`tasks.BUILDERS`, and what it measures to `measures.MEASURES`.
"""
