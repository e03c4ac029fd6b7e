"""What layers keep in host memory, copied on a CPU as it would be from a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.autograd.graph import save_on_cpu

from alphatoken.models import recomputing


@dataclass
class HostCopies:
    """What went to the host, in order, and how much of it came back."""

    out: list[Tensor] = field(default_factory=list)
    back: int = 0


@contextmanager
def host_copies() -> Iterator[HostCopies]:
    """In place of torch's hooks, which keep tensors that are on the host already: hooks that keep a
    copy of each."""
    copies = HostCopies()

    class Copying(save_on_cpu):
        def __init__(self, *, pin_memory: bool, device_type: str) -> None:
            assert (pin_memory, device_type) == (False, "cpu")
            super().__init__(pin_memory=pin_memory, device_type=device_type)
            pack, unpack = self.pack_hook, self.unpack_hook

            def to_host(tensor: Tensor) -> Any:
                copies.out.append(tensor.detach().clone())
                return pack(copies.out[-1])

            def to_device(packed: Any) -> Tensor:
                copies.back += 1
                tensor: Tensor = unpack(packed)
                return tensor

            self.pack_hook, self.unpack_hook = to_host, to_device

    with mock.patch.object(recomputing, "save_on_cpu", Copying):
        yield copies
