"""From files and hub names to micro-batches.

A new row format goes into `rows`, a new order or layout into `batches`.
"""
