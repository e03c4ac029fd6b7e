"""Attention over rows that are divided over ranks (DeepSpeed's Ulysses, arXiv 2309.14509).

Every rank has a part of each row. Before the kernel runs, ranks exchange parts of the row for
heads: each has the whole row then, for its share of the heads; behind it they exchange them back.
What is causal, packed or windowed is therefore the kernel's, on whole rows.

Shape legend: R ranks of a data group, B rows, T positions of whole rows, H query heads, G key/value
heads (H a multiple of G), S heads that each rank is sent, D head size, X numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from alphatoken.batch import WholeRows
from alphatoken.distributed import collectives
from alphatoken.distributed.mesh import Axis, mesh
from alphatoken.models.compatibility import FLASH_KERNELS
from alphatoken.models.decoder import Decoder
from alphatoken.passes.head_shares import HeadShares
from alphatoken.passes.kernels import Attention, kernel_function, named

# Without the kernels' own names: `transformers` looks for "flash" in them.
DIVIDED = {
    kernel: f"alphatoken_divided_{number}"
    for number, kernel in enumerate(("eager", "sdpa", *FLASH_KERNELS))
}
"""By kernel, the attention implementation that layers are configured with whose rows are
divided."""


def divide_attention(decoder: Decoder) -> None:
    """From now on the decoder's layers take parts of rows, with `Batch.whole_rows`."""
    decoder.config._attn_implementation = DIVIDED[decoder.config._attn_implementation]


@contextmanager
def undivided(decoder: Decoder) -> Iterator[None]:
    """The decoder's layers take whole rows meanwhile, different ones on every rank."""
    config: Any = decoder.config
    before = config._attn_implementation
    config._attn_implementation = kernel_of(before)
    try:
        yield
    finally:
        config._attn_implementation = before


def kernel_of(implementation: str) -> str:
    """The kernel that runs where layers are configured with an attention implementation."""
    kernels = {name: kernel for kernel, name in DIVIDED.items()}
    return kernels.get(implementation, implementation)


class _Exchange(torch.autograd.Function):
    """`collectives.exchange`. It is its own transpose, and linear, so that its backward and its
    derivative are exchanges as well; those of several directions go in one message. Every rank must
    run them in the same order."""

    @staticmethod
    def forward(parts_RX: Tensor, among: Axis) -> Tensor:
        return collectives.exchange(parts_RX, among)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Axis], output: Tensor) -> None:
        ctx.among = inputs[1]

    @staticmethod
    def backward(ctx: Any, *outgrads: Tensor) -> tuple[Tensor, None]:
        return collectives.exchange(outgrads[0], ctx.among), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _exchanged(tangents[0], ctx.among)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None], parts: Tensor, among: Axis
    ) -> tuple[Tensor, int]:
        # Behind the dimension of the ranks, any others are numbers that go along.
        return _exchanged(parts.movedim(in_dims[0], 1), among), 1


def _exchanged(parts_RX: Tensor, among: Axis) -> Tensor:
    received_RX: Tensor = _Exchange.apply(parts_RX, among)  # type: ignore[no-untyped-call]
    return received_RX


def rows_for_heads(tensors: Sequence[Tensor], among: Axis) -> list[Tensor]:
    """From this rank's part of the rows in heads for every rank in turn, (B, R S, T/R, D) each with
    its own S and D, to whole rows in those for this rank, (B, S, T, D), in one message."""
    ranks = among.size
    parts = [each.unflatten(1, (ranks, -1)).movedim(1, 0) for each in tensors]
    flat_RX = torch.cat([part.flatten(1) for part in parts], dim=1)
    received_RX = _exchanged(flat_RX, among)
    columns = received_RX.split([part[0].numel() for part in parts], dim=1)
    return [
        column.view(part.shape).movedim(0, 2).flatten(2, 3)
        for column, part in zip(columns, parts, strict=True)
    ]


def heads_for_rows(output_BTHD: Tensor, among: Axis) -> Tensor:
    """The way back for what a kernel returns: from whole rows in this rank's heads, (B, T, S, D),
    to its part of the rows in those of every rank in turn, (B, T/R, R S, D)."""
    parts_RBTHD = output_BTHD.unflatten(1, (among.size, -1)).movedim(1, 0)
    received_RBTHD = _exchanged(parts_RBTHD.contiguous(), among)
    return received_RBTHD.movedim(0, 2).flatten(2, 3)


def attend_divided(
    attention: Attention,
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    whole_rows: WholeRows,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Runs `attention` on whole rows in this rank's share of the heads.

    Takes this rank's part of the rows in all heads: `query` (B, H, T/R, D), `key` and `value`
    (B, G, T/R, D). `attention` gets them, the mask and the positions as they are of whole rows
    without division. Returns (B, T/R, H, D), and no weights. Every rank of the data group must call
    it.
    """
    among = mesh().sequence
    assert among.size == whole_rows.parts, f"{whole_rows.parts} parts for {among.size} ranks"
    shares = HeadShares(query.shape[1], key.shape[1], among.size)
    query, key, value = _own_heads((query, key, value), shares, among)
    arguments["position_ids"] = whole_rows.position_BT
    with named(module, kernel):
        mask = _mask(module.config, query, whole_rows, arguments.get("sliding_window"))
        heads = _SomeHeads(module, query.shape[1] // key.shape[1])
        output_BTHD, _ = attention(heads, query, key, value, mask, **arguments)
    if shares.are_even:
        return heads_for_rows(output_BTHD, among), None
    unused = shares.queries_sent - output_BTHD.shape[2]
    slots_BTHD = heads_for_rows(F.pad(output_BTHD, (0, 0, 0, unused)), among)
    return _chosen(slots_BTHD, shares.outputs(), 2), None


def _own_heads(
    tensors: Sequence[Tensor], shares: HeadShares, among: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's part of the rows in all heads, queries (B, H, T/R, D), keys and values
    (B, G, T/R, D), to whole rows in the heads that this rank takes, and those that they read."""
    query, key, value = tensors
    if shares.are_even:
        # Fewer key heads than ranks, or none for each: a rank has a copy of those its queries read.
        copies = shares.keys_sent * among.size // shares.key_heads
        if copies > 1:
            key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        query, key, value = rows_for_heads((query, key, value), among)
        return query, key, value
    sent = zip(tensors, (shares.queries(), shares.keys(), shares.keys()), strict=True)
    query, key, value = rows_for_heads([_chosen(each, heads, 1) for each, heads in sent], among)
    own, read = len(shares.taken(among.place)), shares.keys_read(among.place)
    return query[:, :own], _chosen(key, read, 1), _chosen(value, read, 1)


def _chosen(tensor: Tensor, places: Sequence[int], dim: int) -> Tensor:
    """Slices of a dimension, some of them perhaps several times. Gradients are added up in the same
    order always, which `index_select` does not promise on a GPU."""
    slices = tensor.unbind(dim)
    return torch.stack([slices[place] for place in places], dim)


class NeighbourParts:
    """What the ranks of a data group tell each other of the causal path in rows that they divide.
    Every one of them must make the same calls."""

    def __init__(self, among: Axis, heads: int) -> None:
        """`heads`: of all ranks together."""
        self._among = among
        own = len(HeadShares(heads, heads, among.size).taken(among.place))
        self._weight = own * among.size / heads

    def own_band(self, band_BTW: Tensor) -> Tensor:
        """From the attention band of whole rows, (B, T, W), averaged over this rank's heads, that
        of its part of the rows, averaged over all heads. Sends (R-1)/R of the band."""
        weighed_BTW = band_BTW * self._weight
        parts_RBTW = weighed_BTW.unflatten(1, (self._among.size, -1)).movedim(1, 0).contiguous()
        return collectives.exchange(parts_RBTW, self._among).mean(0)

    def beyond(self, outgrad_BTO: Tensor, window: int) -> Tensor:
        """The first `window` positions of what follows this rank's part, (B, K, O), fewer where the
        row ends. Gathers as many of each rank, which may be all that it has."""
        count = min(window, outgrad_BTO.shape[1])
        first_BKO = outgrad_BTO[:, :count]
        gathered_RX = collectives.gather_equal(first_BKO.flatten(), self._among)
        following = slice(self._among.place + 1, self._among.place + 1 + -(-window // count))
        parts_RBKO = gathered_RX[following].view(-1, *first_BKO.shape)
        return parts_RBKO.movedim(0, 1).flatten(1, 2)[:, :window]


class _SomeHeads:
    """An attention layer as kernels see it, with its own number of query heads per key head."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _mask(
    config: PretrainedConfig, query_BHTD: Tensor, rows: WholeRows, window: int | None
) -> Tensor | None:
    """The mask of whole rows as the model itself would make it for the kernel that `config` names,
    once for all layers of a pass."""
    kind = "causal" if window is None else f"window of {window}"
    if kind not in rows.masks:
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        batch, _, length, _ = query_BHTD.shape
        rows.masks[kind] = create(
            config=config,
            inputs_embeds=query_BHTD.new_empty(batch, length, 0),
            attention_mask=None,
            past_key_values=None,
            position_ids=rows.position_BT,
        )
    return rows.masks[kind]


def _attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None, "masks are made of whole rows"
    attention = kernel_function(kernel, module)
    return attend_divided(attention, kernel, module, query, key, value, **arguments)


for _kernel, _name in DIVIDED.items():
    AttentionInterface.register(_name, partial(_attend, _kernel))
