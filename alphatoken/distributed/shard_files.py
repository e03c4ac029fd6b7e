"""Tensors by parameter name in safetensors files: whole ones, or the slices that each rank wrote of
its own.

A folder of slices has one file per rank, `slices-RANK-of-RANKS.safetensors`. Its header (key
`alphatoken`, JSON) says what the tensors are, and the shape and first element of each. The slices
can be read on any number of ranks, and whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.util.files import flush

HEADER = "alphatoken"


@dataclass(frozen=True)
class _Part:
    """Where some consecutive elements of a flattened tensor lie."""

    file: Path
    start: int
    end: int
    sliced: bool


def save_slices(
    folder: Path,
    slices: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    header: dict[str, Any],
) -> None:
    """Writes this rank's slices (flat, padded like `zero3` has them) of tensors shaped like the
    named parameters.

    Where parameters are not sharded, rank 0 writes them whole and the others nothing. The same
    input gives the same bytes. Every rank must call it; they do not wait for each other. Raises
    OSError when the disk refuses.
    """
    rank, own, places = collectives.rank(), {}, {}
    for name, flat in slices.items():
        start, end = zero3.slice_range(parameters[name])
        if start < end and (rank == 0 or zero3.is_sharded(parameters[name])):
            own[name] = flat[: end - start]
            places[name] = {"shape": list(zero3.full_shape(parameters[name])), "start": start}
    _write(folder, own, places, header)


@dataclass(frozen=True)
class EqualSlices:
    """This rank's slices of some tensors, flat and padded as `collectives.sum_to_slices` cuts
    them."""

    own: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    """Of the whole tensors."""
    header: dict[str, Any]
    """What else belongs to them, as JSON has it."""

    def save(self, folder: Path) -> Path:
        """Writes this rank's file and returns it. Every rank must call it; they do not wait for
        each other. Raises OSError when the disk refuses."""
        rank, own, places = collectives.rank(), {}, {}
        for name, flat in self.own.items():
            start, numel = rank * len(flat), math.prod(self.shapes[name])
            if start < numel:
                own[name] = flat[: numel - start]
                places[name] = {"shape": list(self.shapes[name]), "start": start}
        return _write(folder, own, places, self.header)


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes one safetensors file, which is on the disk afterwards. Raises OSError when that
    refuses."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from None
    flush(file)


def _write(
    folder: Path,
    own: Mapping[str, Tensor],
    places: Mapping[str, dict[str, Any]],
    header: Mapping[str, Any],
) -> Path:
    """Writes this rank's file of a folder: its elements of each tensor, and where they belong."""
    rank, ranks = collectives.rank(), collectives.world_size()
    tensors = {name: flat.detach().cpu().contiguous() for name, flat in own.items()}
    text = json.dumps({**header, "tensors": places}, sort_keys=True)
    file = folder / f"slices-{rank:05}-of-{ranks:05}.safetensors"
    save_tensors(tensors, file, {HEADER: text})
    return file


class TensorFile(Mapping[str, Tensor]):
    """Tensors by name from one safetensors file or a folder of them, whole or in slices, read when
    asked for.

    `files` are those of the folder, where that is known; else what it shows. `header` is what
    `save_slices` was given; empty for files of others. Raises UserError when a file cannot be read
    or a slice is missing.
    """

    def __init__(self, path: Path, files: Sequence[Path] | None = None) -> None:
        if files is None:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no .safetensors file")
        self._path = path
        self.header: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._parts: dict[str, list[_Part]] = {}
        for file in files:
            try:
                self._read_places(file)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"cannot read {file} as safetensors: {error}") from None
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part.start)
            reached = 0
            for part in parts:
                reached = part.end if part.start == reached else -1
            if reached != math.prod(self._shapes[name]):
                raise UserError(
                    f"{path} does not hold all slices of {name}; is a file missing, or of another "
                    "write?"
                )

    def _read_places(self, file: Path) -> None:
        with safe_open(file, "pt") as tensors:
            header = json.loads((tensors.metadata() or {}).get(HEADER, "{}"))
            places = header.pop("tensors", {})
            self.header |= header
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shape = torch.Size(tensors.get_slice(name).get_shape())
                start = places[name]["start"] if name in places else 0
                self._shapes[name] = torch.Size(places[name]["shape"]) if name in places else shape
                part = _Part(file, start, start + math.prod(shape), name in places)
                self._parts.setdefault(name, []).append(part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.flat(name, 0, math.prod(shape)).view(shape)

    def __str__(self) -> str:
        return str(self._path)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def flat(self, name: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of the flattened tensor, read from the slices that hold them."""
        found = [torch.zeros(0)] if start >= end else []
        for part in self._parts[name]:
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                with safe_open(part.file, "pt") as tensors:
                    own = slice(first - part.start, last - part.start)
                    if part.sliced:
                        found.append(tensors.get_slice(name)[own])
                    else:
                        found.append(tensors.get_tensor(name).flatten()[own])
        return found[0] if len(found) == 1 else torch.cat(found)


def load_fisher(path: str | Path) -> Mapping[str, Tensor]:
    """An estimated Fisher by full parameter name, for `score_tokens` and notebooks.

    Whole float32 tensors of the weight's shape, read when asked for. Raises UserError for an
    unreadable folder.
    """
    return TensorFile(Path(path))
