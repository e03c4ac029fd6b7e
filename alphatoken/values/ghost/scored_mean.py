"""The mean gradient of what was scored: an exponential mean over optimizer steps, divided over the
ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.distributed.shard_files import EqualSlices, TensorFile
from alphatoken.errors import UserError
from alphatoken.values.algebra import FromSignals
from alphatoken.values.ghost.directions import MeanMatrices
from alphatoken.values.ghost.outer_sums import OuterSums

KINDS = ("sum", "signed")
COUNT = "tokens"


class ScoredMean(MeanMatrices):
    """B of the steps before, from the signals that were contracted in them:

        S_n = m S_(n-1) + sum over the response tokens scored in step n of d_t h_t^T
        N_n = m N_(n-1) + their number,                                  B = S_n / N_n

    so every step counts by its tokens, and the first by nothing else. m is `memory`. Signals are of
    the summed losses, without an objective's coefficients, as those of held-out rows are; of pairs,
    of both responses. What the step under way adds counts from its `fold` on. Every rank must call
    `reduce` and `fold` alike.
    """

    def __init__(
        self,
        features: Mapping[str, tuple[int, int]],
        memory: float,
        device: torch.device,
        *,
        signed: bool,
    ) -> None:
        self._features = features
        self._memory = memory
        self._device = device
        self._kinds = KINDS if signed else KINDS[:1]
        self._step = OuterSums(features, device, signed=signed)
        self._step_count = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._count = 0.0
        self._begin_step()

    @property
    def is_empty(self) -> bool:
        """Whether no token was scored in any step before."""
        return self._count == 0

    def count(self, positions: int) -> None:
        """Counts the positions of a micro-batch whose signals are added."""
        self._step_count += positions

    def add(
        self, name: str, outgrad_RO: Tensor, act_RI: Tensor, halves: tuple[Tensor, Tensor] | None
    ) -> None:
        """Signals of some scored positions of this rank; with `signed` also which of them are in
        either half."""
        self._step.add(name, outgrad_RO, act_RI, halves)

    def reduce(self, names: Sequence[str]) -> None:
        """Moves what was added for `names` into the ranks' slices: one reduce-scatter for all of
        them."""
        self._step.reduce(names)

    def fold(self, unreduced: Sequence[Sequence[str]]) -> None:
        """Takes the step's sums into the mean, and before that reduces each of the given groups of
        linears. One all-reduce of the count; a step in which nothing was scored changes nothing."""
        own = torch.tensor(self._step_count, device=self._device)
        count = int(collectives.sum_over_ranks(own))
        if count:
            for names in unreduced:
                self.reduce(names)
            for kind, name in [(kind, name) for kind in self._kinds for name in self._features]:
                own = self._step.own(name, signed=kind == "signed")
                before = self._sums.get((kind, name))
                self._sums[kind, name] = own if before is None else self._memory * before + own
            self._count = self._memory * self._count + count
        self._begin_step()

    def own_slice(self, name: str, *, signed: bool = False) -> Tensor:
        return self._sums[KINDS[signed], name] / self._count

    def all_signals(self, name: str) -> FromSignals:
        raise AssertionError(f"{name}: only the sum of scored signals is kept")

    def state(self) -> EqualSlices | None:
        """What a run that goes on after this step needs; None before any token was scored."""
        if self.is_empty:
            return None
        return EqualSlices(
            own={f"{kind}/{name}": own for (kind, name), own in self._sums.items()},
            shapes={
                f"{kind}/{name}": torch.Size(self._features[name]) for kind, name in self._sums
            },
            header={COUNT: self._count},
        )

    @property
    def saved_bytes(self) -> int:
        """What `state` takes on disk, of all ranks."""
        numels = [
            out_features * in_features for out_features, in_features in self._features.values()
        ]
        return 4 * len(self._kinds) * sum(numels)

    def restore(self, saved: TensorFile) -> None:
        """Takes over what `state` gave on any number of ranks. Raises UserError where that was of
        other linears, or without halves."""
        missing = [
            name for kind in self._kinds for name in self._features if f"{kind}/{name}" not in saved
        ]
        if missing:
            raise UserError(
                f"{saved} does not hold what was scored of {missing[0]}, which "
                "valuation.contrast_from=scored needs: continue with the valuation.layers and "
                "valuation.reliability that it was saved with"
            )
        ranks, rank = collectives.world_size(), collectives.rank()
        for kind, name in [(kind, name) for kind in self._kinds for name in self._features]:
            out_features, in_features = self._features[name]
            numel = out_features * in_features
            length = -(-numel // ranks)
            start = min(rank * length, numel)
            own = saved.flat(f"{kind}/{name}", start, min(start + length, numel))
            padded = torch.zeros(length, device=self._device)
            padded[: len(own)] = own.to(self._device)
            self._sums[kind, name] = padded
        self._count = float(saved.header[COUNT])

    def _begin_step(self) -> None:
        self._step.begin(list(self._features))
        self._step_count = 0
