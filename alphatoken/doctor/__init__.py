"""Checks of nodes, network, folders, template and data before GPUs are busy.

A new check is a pure function on what ranks have gathered, called in `examination`.
"""
