"""The exceptions whose message is meant for the user; recipes print it without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the file, line or key, the value found, and what to do about
    it."""


class ConfigError(UserError):
    """A mistake in a configuration's keys, values or files, or in the arguments that name them."""


class NonFiniteError(UserError):
    """A loss, signal or gradient is NaN or infinite; the message names step, rank, rows and
    linears."""


class RemoteError(RuntimeError):
    """Another rank failed; the message is its own."""
