"""The exceptions whose message is meant for the user; recipes print it without a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """Bad input. The message names the file, line or key, the value found, and what to do about
    it."""


class NonFiniteError(UserError):
    """A loss, signal or gradient is NaN or infinite; the message names step, rank, rows and
    linears."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each key with another value: what was found there, and what is wanted here."""
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
