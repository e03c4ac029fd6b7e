"""What a continued run must have in common with the run that was interrupted, besides its
configuration."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from alphatoken.errors import UserError

# What each input is, and the key by which train.resume_allow lets it change.
INPUTS = {
    "data.train": "the rows of data.train",
    "data.validation": "the rows of data.validation",
    "data.eval": "the rows of data.eval",
    "model.tokenizer": "the tokenizer or its chat template",
    "deepspeed.config": "the DeepSpeed configuration",
    "reference.model": "the reference model (reference.model, by default model.name_or_path)",
    "valuation.fisher": "the Fisher or the stability reference",
}


def is_allowed(key: str, patterns: Sequence[str]) -> bool:
    """Whether `train.resume_allow` lets a key change."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def changed_inputs(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], where: str
) -> list[str]:
    """A note for each input that differs and may. Raises UserError naming those that may not."""
    changed = [key for key in INPUTS if before.get(key) != now.get(key)]
    refused = [key for key in changed if not is_allowed(key, allowed)]
    if refused:
        lines = "\n  ".join(f"{key}: {INPUTS[key]} changed" for key in refused)
        raise UserError(
            f"{where} was trained with other inputs than those given now (train.resume_allow "
            "lists keys that may "
            f"change nevertheless):\n  {lines}"
        )
    return [f"changed since {where}, as train.resume_allow says: {INPUTS[key]}" for key in changed]
