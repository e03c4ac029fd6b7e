"""Counts, on a CPU, what would make the host wait for a GPU: operations whose result, or the shape
of whose result, the host has to know before it can go on.

What the dispatcher shows is counted there. Two kinds never reach it on a CPU, where they are
nothing, and are counted where they are called: lists made of tensors, and copies to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense": "number",  # item, int, float, bool
    "is_nonzero": "number",
    "equal": "number",
    "nonzero": "nonzero",
    "masked_select": "nonzero",
    "bincount": "bincount",
    "lift_fresh": "copy of a list",  # torch.tensor: a copy from memory that is not pinned
    **dict.fromkeys(("_unique", "_unique2", "unique_dim", "unique_consecutive"), "unique"),
    "unique_dim_consecutive": "unique",
}
"""Operations by name."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
TO_HOST = ("tolist", "numpy", "cpu")


class HostWaits(TorchDispatchMode):
    """Counts while it is entered; `by_kind` says what was found, `total` how often."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_kind: Counter[str] = Counter()
        self._patches = ExitStack()

    @property
    def total(self) -> int:
        return self.by_kind.total()

    def __enter__(self) -> HostWaits:
        for name in TO_HOST:
            counted = self._counted(name, getattr(Tensor, name))
            self._patches.enter_context(mock.patch.object(Tensor, name, counted))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        kind = WAITING.get(name)
        if name in INDEXING and any(_is_mask(index) for index in args[1]):
            kind = "mask as index"
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            kind = "repeat_interleave"
        elif name == "_to_copy" and _leaves_the_device(args[0], kwargs):
            kind = "copy to the host"
        if kind is not None:
            self.by_kind[kind] += 1
        return function(*args, **kwargs)

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.by_kind[name] += 1
            return method(*args, **kwargs)

        return counting


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _leaves_the_device(source: Tensor, kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and device.type == "cpu" and source.device.type != "cpu"
