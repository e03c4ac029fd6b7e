"""Running a model on what tasks ask, on all ranks; results do not depend on their number.

Texts are sorted by length and cut into batches before these are dealt to the ranks, as those of
training are, so every text is padded alike whatever the number of ranks is.

Shape legend: B rows, T loss positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken.batch import Batch, to_device
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.cache import Document
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.models.decoder import evaluating
from alphatoken.models.generation import continuations, prompts_of
from alphatoken.util.progress import Countdown

T = TypeVar("T")


@dataclass(frozen=True)
class Judge:
    """A model that tasks are given to. Every rank must make the same calls of its methods."""

    model: PreTrainedModel
    token_losses: Callable[[Batch], Tensor]
    """Losses of a micro-batch's response tokens, (B, T), zero off the response."""
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: list[int]
    device: torch.device
    batch_size: int
    title: str | None = None
    """What its progress is called; None shows none."""
    on_batch: Callable[[], None] = lambda: None
    """Called before each micro-batch and before a task's programs, equally often on every rank."""
    on_program: Callable[[], None] = lambda: None
    """Called before each program, of which every rank runs a share."""

    def titled(self, title: str) -> Judge:
        """The judge with its progress shown."""
        return replace(self, title=title)

    def losses(self, documents: Sequence[Document], places: Sequence[str]) -> list[float]:
        """The loss of each document, in nats, summed over the tokens that it marks, on every rank.

        `places` names the documents in errors. Raises UserError where a loss is not finite.
        """
        found = self._each(documents, self._losses_of)
        for place, loss in zip(places, found, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {place} is not finite; try model.dtype=float32, or look at the "
                    "model's weights"
                )
        return found

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """The likeliest answer to each prompt, token by token, without special tokens, on every
        rank."""

        def answer(batch: Batch) -> list[str]:
            asked = prompts_of(batch)
            completions = continuations(
                self.model,
                asked,
                max_new_tokens=max_new_tokens,
                stop_tokens=self.stop_tokens,
                pad_token=int(self.tokenizer.pad_token_id),
            )
            return [self._said(*both) for both in zip(asked, completions, strict=True)]

        return self._each([document(prompt) for prompt in prompts], answer)

    def _said(self, prompt: Tensor, completion: Tensor) -> str:
        """The text of a completion, with the space that it may begin with, which some tokenizers
        show only behind other text."""
        before, whole = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (prompt, torch.cat([prompt, completion]))
        )
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(completion, skip_special_tokens=True))

    def _losses_of(self, batch: Batch) -> list[float]:
        sums: list[float] = self.token_losses(batch).double().sum(1).tolist()
        return sums

    @torch.no_grad()
    def _each(self, documents: Sequence[Document], work: Callable[[Batch], list[T]]) -> list[T]:
        """What `work` makes of each document of a micro-batch, in order of the documents."""
        layout = Layout(size=self.batch_size, pad_token=int(self.tokenizer.pad_token_id))
        rows, ranks = np.arange(len(documents)), collectives.world_size()
        dealt = micro_batches(_Documents(documents), rows, layout, collectives.rank(), ranks)
        own: dict[int, T] = {}
        active = self.title is not None and collectives.rank() == 0
        countdown = Countdown(self.title or "", "batches", 0, len(dealt), active=active)
        with evaluating(self.model), countdown:
            for number, batch in enumerate(dealt, start=1):
                self.on_batch()
                results = work(to_device(batch, self.device))
                # A placeholder has a result, and no row.
                own.update(zip(batch["rows"].tolist(), results, strict=False))
                countdown.advance(number)
        everywhere: dict[int, T] = {}
        for of_rank in collectives.gather_objects(own):
            everywhere |= of_rank
        return [everywhere[row] for row in range(len(documents))]


class _Documents:
    """Documents in memory, each a row of its own."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)

    def __getitem__(self, index: int) -> list[Document]:
        return [self._documents[index]]


def document(ids: Sequence[int], first: int | None = None, end: int | None = None) -> Document:
    """Tokens of which those from `first` to `end`, by default to the last, are judged; by default
    none."""
    mask = np.zeros(len(ids), dtype=bool)
    if first is not None:
        mask[first:end] = True
    return np.array(ids, dtype=np.int32), mask
