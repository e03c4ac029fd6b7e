"""What a piece of torch code takes: FLOPs of its matrix products, bytes that it makes, and bytes
that autograd keeps of it. It works on tensors with and without storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def grouped_product_flops(
    first: Tensor, second: Tensor, *_: Any, out_val: Tensor, **__: Any
) -> int:
    """Counts products of groups (an expert's tokens) with a matrix for each. Either side may lie in
    one matrix, group behind group: every row, or column, is in one group."""
    inner = first.shape[-1]
    if first.dim() == second.dim() == 2:  # groups along what is summed over
        return 2 * inner * first.shape[0] * second.shape[1]
    return 2 * inner * out_val.numel()


ATEN = torch.ops.aten
FORMULAS = {
    **flop_registry,
    ATEN._grouped_mm: grouped_product_flops,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        ATEN._scaled_dot_product_flash_attention
    ],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's, and for what it has none of."""


class FlopCounter(TorchDispatchMode):
    """FLOP formulas without FlopCounterMode's module tracking, which does not bear
    `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


class PeakBytes(TorchDispatchMode):
    """How many bytes tensors take that were made inside: `now`, and at most (`total`). `shared`
    ones are not counted."""

    def __init__(self, shared: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = WeakSet(each.untyped_storage() for each in shared if isinstance(each, Tensor))
        self.now: int = 0
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.total = max(self.total, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


class CountedPass(ExitStack):
    """Counts FLOPs inside, what autograd keeps, and the inputs of `held` modules; `shared` tensors
    are not counted."""

    def __init__(self, shared: Iterable[Any], held: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._shared = {
            each.untyped_storage()._cdata for each in shared if isinstance(each, Tensor)
        }
        self._held = list(held)
        self._kept: dict[
            int, torch.UntypedStorage
        ] = {}  # the storages themselves, or their addresses would be reused
        self._counter = FlopCounter()

    def __enter__(self) -> CountedPass:
        super().__enter__()
        for module in self._held:
            self.callback(module.register_forward_pre_hook(self._on_held).remove)
        self.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        self.enter_context(torch.enable_grad())
        self.enter_context(self._counter)
        return self

    @property
    def flops(self) -> int:
        return self._counter.total

    @property
    def largest_bytes(self) -> int:
        return max(storage.nbytes() for storage in self._kept.values())

    @property
    def kept_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def _on_held(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._keep(inputs[0])

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._shared:
            self._kept[storage._cdata] = storage
        return tensor
