"""This rank's micro-batches, or its parts of those of its data group, on its device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alphatoken.batch import Batch, part_of, pinned, to_device
from alphatoken.data.batches import ByRow, Indices, Layout, Order, micro_batches, row_tokens
from alphatoken.data.cache import TokenDataset
from alphatoken.data.splits import check_rows_of_b
from alphatoken.distributed.mesh import mesh
from alphatoken.training.setup import Run
from alphatoken.util.ahead import Ahead
from alphatoken.values.refresh import HeldOutRefresh

# Streams of random numbers, so that draws of different parts are kept apart.
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step."""

    rows: int
    """Over all ranks."""
    tokens: int
    """Prompts and responses together, over all ranks."""
    token_pairs: float
    """The sum of the documents' squared lengths, over all ranks; both of a pair are taken to be of
    one length."""
    batches: list[Batch]
    """This rank's micro-batches."""


class Feed:
    """Makes this rank's micro-batches of training steps, held-out draws and evaluations.

    Each is a pure function of the seed and its number. Every rank must ask for the same. Building
    it raises UserError where contrast finds too few training rows.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._train_order = self._order(run.splits.train, TRAINING)
        self._training = Ahead(self._training_on_host)
        if run.config.valuation.enabled and run.config.valuation.contrast:
            self.rows_of_b(0)  # raises before training if there are too few

    def training(self, step: int) -> StepRows:
        """The rows of optimizer step `step` (from 0); those of the next are then read and laid out
        in a thread."""
        rows, batches = self._training.take(step)
        lengths = self._run.splits.train.lengths[rows].astype(float)
        documents = len(self._run.objective.branches) or 1
        return StepRows(
            rows=len(rows),
            tokens=int(lengths.sum()),
            token_pairs=float((lengths**2).sum()) / documents,
            batches=self._delivered(batches),
        )

    def held_out(self, draw: int) -> list[Batch]:
        """The rows of a draw (from 0), which steer the values: of `data.validation`, in an order of
        their own; or with `valuation.held_out: train` those of `data.train` that come next after
        the optimizer steps which the draw serves, and are not trained on in these.
        """
        splits, config = self._run.splits, self._run.config
        if config.valuation.held_out == "train":
            rows = self._next_rows(draw * config.valuation.refresh_every)
            return self._held_out_batches(splits.train, rows, draw)
        assert splits.validation is not None, "valuation needs held-out rows"
        count = config.valuation.validation_sequences
        rows = self._order(splits.validation, HELD_OUT).step(draw, count)
        return self._held_out_batches(splits.validation, rows, draw)

    def contrast(self, step: int) -> list[Batch]:
        """Training rows for B at the refresh before optimizer step `step`: the next ones of the
        order that are neither scored before the next refresh nor held out, as many as held-out
        rows."""
        rows, train = self.rows_of_b(step), self._run.splits.train
        size = self._steering_size(train, rows)
        return self._delivered(self._on_host(train, rows, step, size=size))

    def rows_of_b(self, step: int) -> Indices:
        """The rows of `contrast`, by their number in `data.train`, over all ranks."""
        config, train = self._run.config, self._run.splits.train
        held_out = self._next_rows(step) if config.valuation.held_out == "train" else ()
        rows = self._next_rows(step, without=held_out)
        check_rows_of_b(config, len(train), len(rows))  # a mixture may repeat rows
        return rows

    def first_held_out(self, count: int) -> list[Batch]:
        """The first `count` rows of `data.validation` in the order of the file, for benchmarks."""
        validation = self._run.splits.validation
        assert validation is not None, "valuation needs held-out rows"
        return self._held_out_batches(validation, np.arange(count), 0)

    def evaluation(self) -> Iterator[Batch]:
        """All rows of `data.eval`; nothing where there are none."""
        rows = self._run.splits.eval
        if rows is None:
            return iter(())
        return iter(self._delivered(self._on_host(rows, np.arange(len(rows)), 0)))

    def _training_on_host(self, step: int) -> tuple[Indices, list[Batch]]:
        train = self._run.splits.train
        rows = self._train_order.step(step, self._run.config.train.global_batch_size)
        # Numbered on from step to step: of single rows, too, every other one is in a half of B.
        first = step * self._run.config.train.global_batch_size
        return rows, self._on_host(train, rows, step, first_number=first)

    def by_row(self, part: TokenDataset, *, alone: bool = False) -> dict[str, ByRow]:
        """What micro-batches of a part bring along of what lies on disk, by the name of the column.
        Nothing where the chosen responses of pairs are laid out `alone`: what lies there is of both
        responses, and these only steer values."""
        run, found = self._run, dict[str, ByRow]()
        if alone:
            return found
        nll = None if run.reference is None else run.reference.cached(part)
        if nll is not None:
            found["reference_nll"] = nll
        if run.stored is not None and part is run.splits.train:
            found["stored_value"] = run.stored
        return found

    def _next_rows(self, step: int, without: Iterable[int] = ()) -> Indices:
        """The next `validation_sequences` rows of the training order which neither the steps from
        `step` to the next refresh train on nor `without` has."""
        config = self._run.config
        served = config.valuation.refresh_every * config.train.global_batch_size
        draw, count = step // config.valuation.refresh_every, config.valuation.validation_sequences
        trained = self._train_order.step(draw, served).tolist()
        return self._train_order.following((draw + 1) * served, count, without={*trained, *without})

    def _order(self, part: TokenDataset, stream: int) -> Order:
        return Order(part.sizes, part.weights, (self._run.config.train.seed, stream))

    def _steering_size(self, part: TokenDataset, rows: Indices) -> int:
        """Rows per micro-batch of rows that steer values."""
        longest = int(part.lengths[rows].max(initial=1))
        groups = mesh().data.size
        return self._run.config.held_out_batch_rows(len(rows), longest, groups)

    def _held_out_batches(self, part: TokenDataset, rows: Indices, draw: int) -> list[Batch]:
        """This rank's micro-batches of held-out rows; unless they are compared as pairs, of the
        chosen response alone."""
        alone = self._run.config.valuation.target == "sft"
        size = self._steering_size(part, rows)
        batches = self._on_host(part, rows, draw, size=size, alone=alone)
        return self._delivered(batches, alone=alone)

    def _on_host(
        self,
        part: TokenDataset,
        rows: Indices,
        step: int,
        *,
        size: int | None = None,
        alone: bool = False,
        first_number: int = 0,
    ) -> list[Batch]:
        """This rank's micro-batches of the rows, of `size` rows or as many as training takes, with
        the losses of a cached reference, where there is one; or with the chosen response
        `alone`."""
        run, among = self._run, mesh()
        config, groups = run.config, among.data.size
        layout = Layout(
            size=size or min(config.train.micro_batch_size, math.ceil(len(rows) / groups)),
            pad_token=run.tokenizer.pad_token_id,
            row_tokens=row_tokens(config),
            noise_key=(config.train.seed, step) if config.needs_noise else None,
            halves=config.valuation.reliability,
            first_number=first_number,
            by_row=self.by_row(part, alone=alone),
            first_only=alone,
            parts=among.sequence.size,
        )
        dealt = micro_batches(part, rows, layout, among.data.place, groups)
        if among.sequence.size > 1:
            dealt = [part_of(batch, among.sequence.place, among.sequence.size) for batch in dealt]
        return [pinned(batch) for batch in dealt] if run.device.type == "cuda" else dealt

    def _delivered(self, dealt: Sequence[Batch], *, alone: bool = False) -> list[Batch]:
        """Micro-batches on this rank's device, with the losses of a reference that runs online,
        where there is one."""
        run = self._run
        batches = [to_device(batch, run.device) for batch in dealt]
        if run.reference is not None and run.reference.is_online and not alone:
            with run.stopwatch.phase("reference"):
                run.reference.complete(batches)
        return batches


def held_out_refresh(run: Run, feed: Feed) -> HeldOutRefresh | None:
    """The refresh of a run's scorer with the held-out and contrast rows of its feed; None where
    tokens are not valued."""
    scorer, config = run.model.scorer, run.config.valuation
    if scorer is None:
        return None
    return HeldOutRefresh(
        scorer=scorer,
        draw=feed.held_out,
        draw_contrast=feed.contrast,
        every=config.refresh_every,
        start=config.start_step,
        adam_scale=run.adam_scale,
        first_moment=scorer.first_moment,
        coefficients=run.objective.coefficients if config.target == "preference" else None,
    )
