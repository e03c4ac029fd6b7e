"""Stored values as the tokenised data that other trainers read: they train on the same tokens, with
no code of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from alphatoken.batch import IGNORE_INDEX
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.cache import TokenDataset
from alphatoken.errors import UserError
from alphatoken.store.values import VALUE, columns_of
from alphatoken.util.files import PartialFolder, publish


@dataclass(frozen=True)
class Format:
    """What a trainer reads."""

    columns: tuple[str, ...]
    """Of `input_ids`, `attention_mask`, `labels` (-100 off what is trained on) and `value` (zero
    off the response)."""
    is_folder: bool = False
    """Of `datasets.save_to_disk`; else a Parquet file."""


FORMATS = {
    "parquet": Format(("input_ids", "labels", "value")),
    # SFTTrainer takes `labels` as they are.
    "trl": Format(("input_ids", "labels")),
    # A data set without a `type` is taken as tokenised.
    "axolotl": Format(("input_ids", "attention_mask", "labels")),
    # `tokenized_path` is loaded by `datasets.load_from_disk`.
    "llamafactory": Format(("input_ids", "attention_mask", "labels"), is_folder=True),
}


@dataclass(frozen=True)
class ExportedRows:
    """What was written."""

    rows: int
    trained: int
    """Tokens with a label."""
    responses: int
    """Response tokens."""


def export_values(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    part: TokenDataset,
    target: Path,
    form: str,
) -> ExportedRows:
    """Writes the rows of `data.train` with labels on the tokens that `selection.store` says are
    kept.

    Raises UserError for pairs, an unknown format, a target that exists, or a store that is not
    complete or of other tokens.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form} is not known; known: {', '.join(FORMATS)}")
    if isinstance(config, PreferenceRunConfig):
        raise UserError("pairs have no labels in these formats: export values of single responses")
    if target.exists():
        raise UserError(f"{target} exists; name a new file or folder")
    columns = columns_of(config, tokenizer, part, ("id", "kept", VALUE))
    chosen, counts = FORMATS[form], np.zeros(2, dtype=np.int64)

    def rows() -> Iterator[dict[str, Any]]:
        for row in range(len(part)):
            ((ids, mask),) = part[row]
            made = _row(ids, mask, *(columns[name][row] for name in ("id", "kept", VALUE)))
            counts[:] += (made["labels"] != IGNORE_INDEX).sum(), mask[1:].sum()
            yield {name: made[name] for name in chosen.columns}

    with tempfile.TemporaryDirectory() as scratch:
        try:
            made = _dataset_of(rows, scratch)
            if chosen.is_folder:
                _save_folder(made, target)
            else:
                publish(target, made.to_parquet)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error}") from None
    return ExportedRows(rows=len(part), trained=int(counts[0]), responses=int(counts[1]))


def _dataset_of(rows: Callable[[], Iterator[dict[str, Any]]], scratch: str) -> datasets.Dataset:
    """What `rows` yields, on disk in the folder `scratch`. Raises what goes wrong there as it is,
    UserError or OSError, which datasets wraps."""
    try:
        return datasets.Dataset.from_generator(rows, cache_dir=scratch)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError | OSError):
            raise error.__cause__ from None
        raise


def _save_folder(rows: datasets.Dataset, target: Path) -> None:
    folder = PartialFolder(target)
    try:
        folder.create(replace=False)
        datasets.DatasetDict({"train": rows}).save_to_disk(folder.path)
        folder.publish()
    finally:
        folder.discard()


def _row(
    ids_T: np.ndarray[Any, Any],
    mask_T: np.ndarray[Any, Any],
    id_R: np.ndarray[Any, Any],
    kept_R: np.ndarray[Any, Any],
    value_R: np.ndarray[Any, Any],
) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of a row from its tokens and response mask, (T,), and what is stored of its
    response tokens, (R,)."""
    own_T = mask_T.copy()
    own_T[0] = False  # nothing predicts it
    assert (ids_T[own_T] == id_R).all(), "the store has been checked to be of these tokens"
    labels_T = np.full(len(ids_T), IGNORE_INDEX, dtype=np.int64)
    labels_T[own_T] = np.where(kept_R > 0, ids_T[own_T], IGNORE_INDEX)
    value_T = np.zeros(len(ids_T), dtype=np.float32)
    value_T[own_T] = value_R
    return {
        "input_ids": ids_T,
        "attention_mask": np.ones_like(ids_T),
        "labels": labels_T,
        "value": value_T,
    }
