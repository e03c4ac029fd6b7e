"""The stability side: a diagonal Fisher file, the reference weights, and the drift of the current ones.

Everything is kept as this rank's flat slices (`zero3`), so drift costs no communication until the product is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alphatoken import collectives, valuation, zero3
from alphatoken.errors import UserError


class Drift:
    """V = F * (W - W_ref) for each scored weight, from the fp32 masters (Eq. 10).

    `fisher` and `reference` map full parameter names to whole tensors of the weight's shape, loaded one at a time;
    without `reference` the weights of this moment are the reference, and the drift starts at exactly zero.
    Raises UserError when a scored weight is missing from either, has another shape, or a Fisher entry is negative or
    not finite.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor] | TensorFile,
        reference: Mapping[str, Tensor] | TensorFile | None,
        device: torch.device,
    ) -> None:
        self._parameters = parameters
        self._device = device
        self._fisher: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            importance = _whole(fisher, name, parameter, "Fisher")
            if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
                raise UserError(f"the Fisher of {name} has negative or non-finite entries; estimate it again")
            self._fisher[name] = self._own_slice(importance, parameter)
            if reference is None:
                self._reference[name] = zero3.master_slice(parameter, device).clone()
            else:
                self._reference[name] = self._own_slice(_whole(reference, name, parameter, "reference"), parameter)

    def _own_slice(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        return zero3.padded_slice(whole, parameter).to(self._device, torch.float32).clone()

    def matrices(self, names: Sequence[str]) -> list[Tensor]:
        """The whole V of the named weights, float32: one all-gather of this rank's slices. Every rank must call it."""
        slices = [
            valuation.drift(
                self._fisher[name], zero3.master_slice(self._parameters[name], self._device), self._reference[name]
            )
            for name in names
        ]
        shapes = [zero3.full_shape(self._parameters[name]) for name in names]
        if not zero3.is_sharded(self._parameters[names[0]]):
            return [part.view(shape) for part, shape in zip(slices, shapes, strict=True)]
        return collectives.gather_slices(slices, shapes)


class TensorFile:
    """Tensors by name from one safetensors file or a folder of them, read lazily. Raises UserError when unreadable."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no .safetensors file")
        self._path = path
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    self._file_of.update(dict.fromkeys(tensors.keys(), file))
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {file} as safetensors: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def __str__(self) -> str:
        return str(self._path)


def _whole(tensors: Mapping[str, Tensor] | TensorFile, name: str, parameter: nn.Parameter, what: str) -> Tensor:
    where = f"{what} {tensors}" if isinstance(tensors, TensorFile) else what
    if name not in tensors:
        raise UserError(f"the {where} has no tensor {name}, which is scored; was it made for another model or depth?")
    tensor = tensors[name]
    shape = zero3.full_shape(parameter)
    if tensor.shape != shape:
        raise UserError(f"the {where} holds {name} of shape {tuple(tensor.shape)}; the model's is {tuple(shape)}")
    return tensor
