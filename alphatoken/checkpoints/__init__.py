"""What lies in a run folder, when it is valid, how a run goes on, and exports.

State of a new part of training joins what `saving` keeps; an input that must not change on resuming
joins `resuming.INPUTS`.
"""
