"""The Fisher information of the starting model and the drift it weighs.

A new way to draw responses or to square gradients goes into `sampling` or `squares`; files and
resuming need no change.
"""
