"""What every estimator of token values offers: `refresh` takes in held-out rows and drift, `score`
values a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.config.sections import ModelConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.distributed.adam_scale import FirstMoment
from alphatoken.distributed.shard_files import EqualSlices, TensorFile
from alphatoken.models.decoder import Decoder
from alphatoken.objectives.base import ResponseLosses
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import TokenValues
from alphatoken.values.balance import RunningScales

Coefficients = Callable[[ResponseLosses], Tensor]
"""What the loss of each held-out position counts: d objective / d (sum_t l_t) of its document,
detached, (B, T); `Objective.coefficients` of the run."""

Eligible = Callable[[ResponseLosses], Tensor]
"""Which response tokens of a micro-batch may be trained on, (B, T) bool, False off the response."""

BodyPass = Callable[[Batch], Tensor]
"""Runs a decoder's body on a batch, without a graph; returns what enters the head, (B, T, H)."""

SliceScale = Callable[[nn.Parameter], Tensor | float]
"""What an optimizer multiplies a parameter's gradient by, on this rank's slice."""


@dataclass(frozen=True)
class Scores:
    """What one scoring pass found out."""

    values: TokenValues
    nll_BT: Tensor
    """Token losses, (B, T) float32, zero off the response."""


def of_eligible(eligible: Eligible, coefficients: Coefficients | None) -> Coefficients:
    """Coefficients as given, or 1 where there are none, with 0 for tokens that are not eligible."""

    def found(losses: ResponseLosses) -> Tensor:
        eligible_BT = eligible(losses).to(losses.nll_BT.dtype)
        return eligible_BT if coefficients is None else eligible_BT * coefficients(losses)

    return found


def count_eligible(
    eligible: Eligible, batches: Sequence[Batch], losses: Sequence[Tensor]
) -> Tensor:
    """How many tokens of micro-batches with these losses, (B, T) each, are eligible; int64."""
    found = [
        eligible(ResponseLosses(batch=batch, nll_BT=nll_BT)).sum()
        for batch, nll_BT in zip(batches, losses, strict=True)
    ]
    return torch.stack(found).sum()


class Scorer(ABC):
    """Values response tokens of batches. Every rank must call `refresh` together, and `score`
    unless it is resident."""

    def __init__(self, decoder: Decoder, config: ValuationConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.scales = RunningScales()
        self.run_body: BodyPass = decoder.hidden_states
        """For the rows that `refresh` is given; a training run replaces it by one that keeps its
        engine's order of modules."""
        self.eligible: Eligible | None = None
        """Of which response tokens of contrast rows B is the mean, where `refresh` is given such
        rows; None for all. A training run with a veto sets it."""
        self.first_moment: FirstMoment | None = None
        """The optimizer's, where `valuation.contrast_from` is moment; set once it is built."""
        self.is_followed = True
        """Whether later steps may read what is scored now; see `without_later_steps`."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        decoder: Decoder,
        config: ValuationConfig,
        device: torch.device,
        *,
        drift: Drift | None,
        adam_scale: SliceScale | None,
    ) -> Scorer:
        """Makes the scorer of a configuration; every rank must call it.

        `drift` is None where stability counts nothing. `adam_scale` is what the run's optimizer
        multiplies gradients by, where there is one. Raises UserError for what the estimator cannot
        do; a training run has asked `check` before, the library's `score_tokens` has not.
        """

    @classmethod
    def check(cls, model: ModelConfig, valuation: ValuationConfig, device: torch.device) -> None:
        """Refuses, before weights are read or a Fisher is estimated, settings that the estimator
        does not know and a model that it cannot value on this device.

        Raises UserError.
        """
        return

    @classmethod
    def notes(cls, decoder: Decoder, config: ValuationConfig) -> list[str]:
        """What this estimator does not see of the scored layers, a sentence each, for the log."""
        return []

    @property
    def part_weights(self) -> tuple[float, float]:
        """What adaptation and stability are multiplied by before they are added."""
        if self.config.balance == "std":
            return self.scales.part_weights(self.config.stability_weight)
        return 1.0, self.config.stability_weight

    @abstractmethod
    def capture(self) -> EntryCapture:
        """Wrap the model's forward pass in this, then hand its `.entry` to `score`."""

    @abstractmethod
    def refresh(
        self,
        batches: Sequence[Batch] | None,
        scored_tokens: int = 0,
        contrast: Sequence[Batch] | None = None,
        coefficients: Coefficients | None = None,
    ) -> list[Tensor]:
        """Takes over the current weights and drift and, from `batches`, new held-out signals (None
        keeps the old ones).

        `batches` is this rank's share of the validation sequences (dicts of `input_ids`, `labels`
        and, unless all padding is on the right, `attention_mask`), equally many on every rank; one
        without response positions is a placeholder. `scored_tokens`, about as many as this rank
        will score with them, helps to choose contractions. `contrast` is this rank's share of the
        training rows that B is the mean gradient of, likewise, or of their `eligible` tokens; an
        estimator that does not read `valuation.contrast` is never given any. `coefficients`
        (`valuation.target: preference`) are called with the losses of each batch of either kind and
        multiply them in the sums, which are still divided by the number of response tokens, or of
        `eligible` ones; None counts each loss once. Returns the losses of `batches` and then of
        `contrast`, (B, T) float32 each, not multiplied.
        """

    @property
    def needs_contrast_rows(self) -> bool:
        """Whether the next `refresh` with held-out rows must be given training rows for B."""
        return self.config.contrast_source == "drawn"

    @contextmanager
    def without_later_steps(self) -> Iterator[None]:
        """For scoring that no optimizer step follows: nothing of what is scored inside is collected
        for `after_step`."""
        self.is_followed = False
        try:
            yield
        finally:
            self.is_followed = True

    def after_step(self) -> None:
        """Takes over, after an optimizer step, what later steps are to know of the tokens scored in
        it. Every rank must call it."""
        return

    def state(self) -> EqualSlices | None:
        """What a checkpoint must hold besides weights, optimizer and `scales`; None if nothing."""
        return None

    @property
    def saved_bytes(self) -> int:
        """What `state` takes on disk, of all ranks."""
        return 0

    def restore(self, saved: TensorFile) -> None:
        """Takes over what `state` gave, on any number of ranks."""
        return

    @abstractmethod
    def score(self, entry: Entry, batch: Batch) -> Scores:
        """Values of every response position of a batch whose forward pass was captured as `entry`;
        of summed losses."""

    @abstractmethod
    def nonfinite_parts(self) -> list[str]:
        """Parts of the model whose signals were not finite since the last call, in order of the
        forward pass."""
