"""A model's weights as files that `from_pretrained` reads, written while the weights arrive: at
most one file and one weight of them are in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from alphatoken.distributed import collectives, zero3

SHARD_BYTES = 5 * 10**9  # as in the published models of most


@dataclass(frozen=True)
class Source:
    """A weight that can be had."""

    numel: int
    dtype: torch.dtype
    read: Callable[[], Tensor | None]
    """Gives it whole in the host's memory, on rank 0; every rank must call it."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def names_to_save(model: PreTrainedModel) -> list[str]:
    """The names in memory of what `model.save_pretrained` writes: weights and persistent buffers,
    of tied ones the one that loading asks for. The weights themselves need not be there."""
    # transformers tells tied ones by the model's own parameters where a tensor has no storage.
    state: dict[str, Tensor] = {
        name: torch.empty(zero3.full_shape(model.get_parameter_or_buffer(name)), device="meta")
        for name in model.state_dict()
    }
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return list(remove_tied_weights_from_state_dict(state, model))


Prefix = tuple[str | None, str | None, str]
"""What transformers put before names in files, or took from them, to get those in memory; and of
which part of the model."""


def prefixes_of(model: PreTrainedModel) -> list[Prefix]:
    """What only loading can tell of the names in the files that a model was loaded from."""
    used = [each for each in _conversions(model, ()) if isinstance(each, PrefixChange)]
    return [_prefix(each) for each in used]


def batches_to_save(
    model: PreTrainedModel, weights: Mapping[str, Source], prefixes: Sequence[Prefix] = ()
) -> Iterator[dict[str, Tensor]]:
    """All weights in order, at most SHARD_BYTES of them at a time (or what is converted together),
    by the names that they have in files of transformers: `save_pretrained`, piece by piece.

    `prefixes`: what `prefixes_of` gave, where `model` was built here. Batches are empty on ranks
    other than 0, all of which must take as many. Whoever takes a batch empties it, or it stays in
    memory.
    """
    batch: dict[str, Tensor] = {}
    size = 0
    for group in _groups(model, list(weights), _conversions(model, prefixes)):
        size_of_group = sum(weights[name].nbytes for name in group.names)
        if size and size + size_of_group > SHARD_BYTES:
            yield batch
            batch, size = {}, 0
        batch |= group.read(weights)
        size += size_of_group
    yield batch


class WeightFiles:
    """Writes weights into safetensors files of a folder, at most SHARD_BYTES (or one weight) each,
    and their index. Raises OSError or SafetensorError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, int] = {}
        self._bytes = 0
        self.parameters = 0
        """Elements of what was written."""
        self.files = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Writes some weights by name, and takes them out of `tensors`."""
        pending: dict[str, Tensor] = {}
        size = 0
        for name in list(tensors):
            tensor = tensors.pop(name)
            if pending and size + tensor.nbytes > SHARD_BYTES:
                self._save(pending)
                size = 0
            pending[name] = tensor.contiguous()
            size += tensor.nbytes
        if pending:
            self._save(pending)

    def finish(self) -> None:
        """Gives the files the names that loading looks for."""
        if self.files == 1:
            self._file(0).rename(self._folder / "model.safetensors")
            return
        names = [
            f"model-{number + 1:05}-of-{self.files:05}.safetensors" for number in range(self.files)
        ]
        for number, name in enumerate(names):
            self._file(number).rename(self._folder / name)
        index = {
            "metadata": {"total_parameters": self.parameters, "total_size": self._bytes},
            "weight_map": {name: names[place] for name, place in sorted(self._places.items())},
        }
        (self._folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )

    def _save(self, pending: dict[str, Tensor]) -> None:
        save_file(pending, self._file(self.files), {"format": "pt"})
        self._places |= dict.fromkeys(pending, self.files)
        self._bytes += sum(tensor.nbytes for tensor in pending.values())
        self.parameters += sum(tensor.numel() for tensor in pending.values())
        self.files += 1
        pending.clear()

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


@dataclass(frozen=True)
class _Group:
    """Weights that are converted together, and how."""

    target: str
    converter: WeightConverter | None
    """None where only the name changes, to `target`."""
    renamings: Sequence[WeightRenaming]
    """For the names that a converter gives."""
    model: PreTrainedModel
    patterns: dict[str, str] = field(default_factory=dict)
    """By the name of each weight, the converter's pattern that it matches."""

    @property
    def names(self) -> list[str]:
        return list(self.patterns)

    def read(self, weights: Mapping[str, Source]) -> dict[str, Tensor]:
        """The weights as files have them; nothing on ranks other than 0, all of which must call
        it."""
        read = {name: weights[name].read() for name in self.names}
        found = {name: tensor for name, tensor in read.items() if tensor is not None}
        if collectives.rank() > 0:
            return {}
        if self.converter is None:
            return {self.target: found[self.names[0]]}
        converter: Any = self.converter
        for name, tensor in found.items():
            converter.add_tensor(self.target, name, self.patterns[name], tensor)
        converted = converter.convert(self.target, model=self.model, config=self.model.config)
        return {
            apply_renamings(name, list(self.renamings)): made[0] if isinstance(made, list) else made
            for name, made in converted.items()
        }


def _groups(
    model: PreTrainedModel, names: Sequence[str], conversions: Sequence[WeightTransform]
) -> list[_Group]:
    """What `transformers.core_model_loading.revert_weight_conversion` does with each weight, which
    wants all of them at once."""
    reverses = [conversion.reverse_transform() for conversion in conversions[::-1]]
    renamings = [each for each in reverses if isinstance(each, WeightRenaming)]
    converters = [each for each in reverses if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        converter = None if pattern is None else deepcopy(by_pattern[pattern])
        if pattern is None:
            target = apply_renamings(name, renamings)
        group = groups.setdefault(target, _Group(target, converter, renamings, model))
        group.patterns[name] = pattern or name
    return list(groups.values())


def _conversions(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> list[WeightTransform]:
    """What transformers did with the weights when it loaded them, or would have done."""
    kept: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if kept is not None:
        # Under ZeRO-3 transformers 5.23 keeps those of its mapping that matched no name as well.
        return [each for each in kept if each.was_used()]
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [
        each for each in mapping if not isinstance(each, PrefixChange) or _prefix(each) in prefixes
    ]


def _prefix(change: PrefixChange) -> Prefix:
    return change.prefix_to_add, change.prefix_to_remove, change.model_prefix
