"""This rank's micro-batches, on its device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alphatoken.batch import Batch, to_device
from alphatoken.data.batches import Indices, Layout, Order, micro_batches, row_tokens
from alphatoken.data.cache import TokenDataset
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.training.setup import Run

# Streams of random numbers, so that draws of different parts are kept apart.
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step."""

    rows: int
    """Over all ranks."""
    tokens: int
    """Prompts and responses together, over all ranks."""
    batches: list[Batch]
    """This rank's micro-batches."""


class Feed:
    """Makes this rank's micro-batches of training steps, held-out draws and evaluations.

    Each is a pure function of the seed and its number. Every rank must ask for the same. Building
    it raises UserError where contrast finds no training rows.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._train_order = self._order(run.splits.train, TRAINING)
        if run.config.valuation.enabled and run.config.valuation.contrast:
            self._contrast_rows(0)  # raises before training if there are none

    def training(self, step: int) -> StepRows:
        """The rows of optimizer step `step` (from 0)."""
        train = self._run.splits.train
        rows = self._train_order.step(step, self._run.config.train.global_batch_size)
        return StepRows(
            rows=len(rows),
            tokens=int(train.lengths[rows].sum()),
            batches=self._micro_batches(train, rows, step),
        )

    def held_out(self, draw: int) -> list[Batch]:
        """The validation rows of a draw (from 0), which steer the values."""
        validation = self._run.splits.validation
        assert validation is not None, "valuation needs held-out rows"
        order = self._order(validation, HELD_OUT)
        rows = order.step(draw, self._run.config.valuation.validation_sequences)
        return self._micro_batches(validation, rows, draw, compares=self._compares_held_out)

    def contrast(self, step: int) -> list[Batch]:
        """Training rows for B at the refresh before optimizer step `step`: the next ones of the
        order that are not scored before the next refresh, as many as held-out rows."""
        return self._micro_batches(self._run.splits.train, self._contrast_rows(step), step)

    def first_held_out(self, count: int) -> list[Batch]:
        """The first `count` validation rows in the order of the file, for benchmarks."""
        validation = self._run.splits.validation
        assert validation is not None, "valuation needs held-out rows"
        compares = self._compares_held_out
        return self._micro_batches(validation, np.arange(count), 0, compares=compares)

    def evaluation(self) -> Iterator[Batch]:
        """All rows of `data.eval`; nothing where there are none."""
        rows = self._run.splits.eval
        return iter([] if rows is None else self._micro_batches(rows, np.arange(len(rows)), 0))

    def _contrast_rows(self, step: int) -> Indices:
        config, train = self._run.config, self._run.splits.train
        size, window = config.train.global_batch_size, config.valuation.refresh_every
        scored = {
            int(row)
            for each in range(step, step + window)
            for row in self._train_order.step(each, size)
        }
        count = config.valuation.validation_sequences
        rows = self._train_order.following((step + window) * size, count, without=scored)
        if not len(rows):
            raise UserError(
                f"valuation.contrast={config.valuation.contrast} needs training rows other than "
                f"those being scored, but data.train has {len(train)}, and the "
                f"{window} optimizer steps between refreshes (valuation.refresh_every) take "
                f"{size} each (train.global_batch_size): lower these, or add rows"
            )
        return rows

    def _order(self, part: TokenDataset, stream: int) -> Order:
        return Order(part.sizes, part.weights, (self._run.config.train.seed, stream))

    @property
    def _compares_held_out(self) -> bool:
        """Whether held-out rows are pairs, whose losses are compared with the reference's."""
        return self._run.config.valuation.target == "preference"

    def _micro_batches(
        self, part: TokenDataset, rows: Indices, step: int, *, compares: bool = True
    ) -> list[Batch]:
        """This rank's micro-batches of the rows; `compares` brings the losses of the reference,
        where there is one."""
        run, ranks = self._run, collectives.world_size()
        config, reference = run.config, run.reference if compares else None
        layout = Layout(
            # A few held-out rows are spread over all ranks rather than left to one.
            size=min(config.train.micro_batch_size, math.ceil(len(rows) / ranks)),
            pad_token=run.tokenizer.pad_token_id,
            row_tokens=row_tokens(config),
            noise_key=(config.train.seed, step) if config.needs_noise else None,
            halves=config.valuation.reliability,
            reference=None if reference is None else reference.cached(part),
        )
        dealt = micro_batches(part, rows, layout, collectives.rank(), ranks)
        batches = [to_device(batch, run.device) for batch in dealt]
        if reference is not None and reference.is_online:
            with run.stopwatch.phase("reference"):
                reference.complete(batches)
        return batches
