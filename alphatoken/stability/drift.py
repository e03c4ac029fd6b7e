"""Stability: how far the scored weights have moved from the reference, weighed by its diagonal
Fisher.

Everything is kept as this rank's flat slices (`zero3`), so drift costs no communication until the
product is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.shard_files import TensorFile
from alphatoken.errors import UserError
from alphatoken.util.files import fingerprint


class Drift:
    """V = F * (W - W_ref) for each scored weight, from the fp32 masters (Eq. 10).

    `fisher` and `reference` map full parameter names to whole tensors of the weight's shape; of a
    `TensorFile` only this rank's slices are read. Without `reference` the weights of this moment
    are the reference, and the drift starts at exactly zero. Per element it keeps 4 bytes of Fisher
    and 2 (where bf16 holds it exactly) or 4 of the reference. Every rank must build it. Raises
    UserError when a scored weight is missing from either, has another shape, or a Fisher entry is
    negative or not finite.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
        device: torch.device,
    ) -> None:
        self.parameters = parameters
        self._device = device
        self._fisher: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}

        def read() -> None:
            for name in parameters:
                importance = self._own_slice(fisher, name, "Fisher")
                if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
                    raise UserError(
                        f"the Fisher of {name} has negative or non-finite entries; estimate it "
                        "again"
                    )
                self._fisher[name] = importance
                if reference is not None:
                    self._reference[name] = _compact(self._own_slice(reference, name, "reference"))

        collectives.agree(read)
        if reference is None:
            for name, parameter in parameters.items():
                self._reference[name] = _compact(zero3.master_slice(parameter, device))

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    @property
    def reference_bytes(self) -> int:
        """Memory that this rank's slices of the reference take."""
        return sum(slice_.nbytes for slice_ in self._reference.values())

    @torch.no_grad()
    def own(self, name: str) -> Tensor:
        """This rank's slice of the named weight's V, float32, flat and padded."""
        master = zero3.master_slice(self.parameters[name], self._device)
        return weighted_drift(self._fisher[name], master, self._reference[name])

    def matrices(self, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """The whole V of the named weights, rounded to `dtype`: one all-gather of this rank's
        slices. Every rank must call it."""
        return zero3.whole_tensors(
            [self.own(name).to(dtype) for name in names], [self.parameters[name] for name in names]
        )

    @torch.no_grad()
    def magnitudes(self) -> tuple[float, float]:
        """|W - W_ref| over all scored weights, and 1/2 sum F (W - W_ref)^2: an estimate, from a
        diagonal, of how much the reference's own loss per completion has risen. One all-reduce of 2
        float64; every rank must call it.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for name, parameter in self.parameters.items():
            start, end = zero3.slice_range(parameter)
            own = slice(0, end - start)  # what lies behind is padding, of any content
            moved = (
                zero3.master_slice(parameter, self._device)[own]
                - self._reference[name][own].float()
            )
            squares = moved.double().square_()
            sums += torch.stack([squares.sum(), 0.5 * (self._fisher[name][own] * squares).sum()])
        if any(map(zero3.is_sharded, self.parameters.values())):
            collectives.sum_over_ranks(sums)
        squared_norm, weighted = sums.tolist()
        return squared_norm**0.5, weighted

    def identity(self) -> str:
        """A hash of the Fisher and the reference, the same on any number of ranks. Every rank must
        call it."""
        both = []
        for slices in (self._fisher, self._reference):

            def read(name: str, start: int, end: int, slices: dict[str, Tensor] = slices) -> Tensor:
                return slices[name][: end - start]

            both.append(zero3.checksums(self.parameters, self._device, read))
        return fingerprint(both)

    def _own_slice(self, tensors: Mapping[str, Tensor], name: str, what: str) -> Tensor:
        parameter = self.parameters[name]
        shape, (start, end) = zero3.full_shape(parameter), zero3.slice_range(parameter)
        where = f"{what} {tensors}" if isinstance(tensors, TensorFile) else what
        if name not in tensors:
            raise UserError(
                f"the {where} has no tensor {name}, which is scored; was it made for another model "
                "or depth?"
            )
        if isinstance(tensors, TensorFile):
            found = tensors.shape(name)
            own = tensors.flat(name, start, end) if found == shape else None
        else:
            found = tensors[name].shape
            own = tensors[name].reshape(-1)[start:end]
        if own is None or found != shape:
            raise UserError(
                f"the {where} holds {name} of shape {tuple(found)}; the model's is {tuple(shape)}"
            )
        return zero3.padded(own, parameter).to(self._device, torch.float32).clone()


def _compact(reference: Tensor) -> Tensor:
    """A copy in bf16 where that loses nothing, as with a checkpoint that was bf16; else in
    float32."""
    rounded = reference.to(torch.bfloat16)
    return rounded if torch.equal(rounded.float(), reference) else reference.clone()


def weighted_drift(fisher: Tensor, weight: Tensor, reference: Tensor) -> Tensor:
    """V = F * (W - W_ref), elementwise, float32 (Eq. 10). All three have one shape, a weight's or a
    slice of it."""
    return fisher.float() * (weight.float() - reference.float())
