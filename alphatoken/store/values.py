"""Token values of a dataset, made once: which rows they are of, and reading them for a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import tokenizer_identity
from alphatoken.errors import UserError
from alphatoken.store.rows_folder import (
    SETTINGS,
    Contents,
    StoredColumn,
    longest_chain,
    read_settings,
)
from alphatoken.util.differences import differences
from alphatoken.util.files import fingerprint

FORMAT_VERSION = 1
CONTENTS = Contents("values", "token values", "selection.store")
VALUE = "value"
"""The column that `selection.policy: stored` ranks by."""


def lengths_of(config: RunConfig) -> dict[str, int]:
    """How long rows may be."""
    if isinstance(config, PreferenceRunConfig):
        return config.preference.model_dump(include={"max_prompt_tokens", "max_response_tokens"})
    return {"max_length": config.data.max_length}


def rows_settings(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, part: TokenDataset
) -> dict[str, Any]:
    """What says which tokens numbers by row belong to: those of the same tokenizer, template, data,
    and lengths."""
    return {
        "tokenizer_sha256": tokenizer_identity(tokenizer),
        "lengths": lengths_of(config),
        "data": part.identity,
        "rows": len(part),
    }


def columns_of(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    part: TokenDataset,
    names: Sequence[str] = (VALUE,),
) -> dict[str, StoredColumn]:
    """Columns of `selection.store` by name, for the rows of `data.train`.

    Raises UserError where the folder is no store, is not complete, or has values of other tokens.
    """
    folder = store_folder(config)
    make = "make it with recipes/value_tokens.py"
    if not (folder / SETTINGS).is_file():
        raise UserError(f"selection.store: {folder} has no {SETTINGS}; {make}")
    expected = rows_settings(config, tokenizer, part)
    theirs = {name: read_settings(folder).get(name) for name in expected}
    changed = differences(theirs, expected)
    if changed:
        raise UserError(
            f"selection.store: {folder} holds values of other tokens than this run trains on; "
            f"{make} anew:\n  " + "\n  ".join(changed)
        )
    chain = longest_chain(folder, len(part))
    done = max((end for _, end, _ in chain), default=0)
    if done < len(part):
        raise UserError(
            f"selection.store: {folder} has values of {done} of {len(part)} rows; start "
            "recipes/value_tokens.py again, and it goes on"
        )
    return {name: StoredColumn(chain, name, CONTENTS) for name in names}


def identity_of_store(config: RunConfig) -> str:
    """A hash of what the values in `selection.store` were made from."""
    return fingerprint(read_settings(store_folder(config)))


def store_folder(config: RunConfig) -> Path:
    """Where values are written."""
    return config.selection.store or config.train.output_dir / "values"
