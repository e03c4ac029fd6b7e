"""A stand-in for the packages of flash attention, in plain torch, so that everything around their
kernels runs without a GPU: what `transformers` imports of `flash_attn` (2) and
`flash_attn_interface` (3).

Unlike the kernels it takes any dtype, so that values can be compared with SDPA's in float32:
`transformers` itself only warns where a dtype is not of 16 bits.

Shape legend: B rows, T queries, S keys, N tokens of all documents, H query heads, G key/value heads
(H a multiple of G), D head size.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers.integrations.flash_attention as integration
import transformers.modeling_flash_attention_utils as dispatch
from torch import Tensor

from alphatoken.models import compatibility

Calls = list[tuple[str, list[int]]]
"""Per call of a kernel its kind, `dense` or `varlen`, and the lengths of its documents."""


@contextmanager
def stand_in(version: int = 2) -> Iterator[Calls]:
    """Has `transformers` and this package find flash attention of a version installed, on a device
    that can run it; yields the calls of its kernels."""
    calls: Calls = []
    name = f"flash_attention_{version}"
    entry = dispatch.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
    devices = (*entry["supported_devices"], (lambda: True, "cpu"))
    found = {"general_availability_check": lambda: True, "supported_devices": devices}
    kernel = compatibility.FLASH_KERNELS[name]
    here = replace(kernel, is_installed=lambda: True)
    with (
        mock.patch.dict(sys.modules, _modules(version, calls)),
        mock.patch.dict(entry, found),
        mock.patch.object(dispatch, f"is_flash_attn_{version}_available", return_value=True),
        mock.patch.object(dispatch, "_loaded_implementation", None),
        # For float32 it looks for a linear, of which GPT-2 has none.
        mock.patch.object(integration, "get_target_dtype", lambda query, _: query.dtype),
        mock.patch.dict(compatibility.FLASH_KERNELS, {name: here}),
        mock.patch.object(compatibility, "cuda_generation", return_value=compatibility.HOPPER),
    ):
        yield calls


def _modules(version: int, calls: Calls) -> dict[str, ModuleType]:
    module = ModuleType("flash_attn" if version == 2 else "flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    dense, varlen = _kernels(calls)
    contents: dict[str, Any] = {
        "flash_attn_func": dense,
        "flash_attn_varlen_func": varlen,
        "flash_attn_with_kvcache": None,
    }
    if version == 3:  # without dropout, and a pair where version 2 returns the output alone
        contents["flash_attn_func"] = _of_version_3(dense)
        contents["flash_attn_varlen_func"] = _of_version_3(varlen)
    for name, function in contents.items():
        setattr(module, name, function)
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input = _pad_input  # type: ignore[attr-defined]
    padding.unpad_input = None  # type: ignore[attr-defined]
    return {module.__name__: module} | ({padding.__name__: padding} if version == 2 else {})


def _pad_input(packed: Tensor, indices_N: Tensor, batch: int, length: int) -> Tensor:
    """Tokens (N, H, D) at their places in (B, T, H, D), zeros elsewhere."""
    padded = packed.new_zeros(batch * length, *packed.shape[1:])
    return padded.index_copy(0, indices_N, packed).view(batch, length, *packed.shape[1:])


WithSums = tuple[Tensor, Tensor, None]
"""What version 2 returns if asked: the output, logarithms of softmax denominators, and no
probabilities."""


def _kernels(calls: Calls) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def dense(  # noqa: PLR0913 - what `transformers` looks for in flash_attn's signature
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor | WithSums:
        """q (B, T, H, D), k and v (B, S, G, D); returns (B, T, H, D), and if asked (B, H, T)."""
        calls.append(("dense", [q.shape[1]] * q.shape[0]))
        assert dropout_p == 0.0
        output, sums = _attention(
            q,
            k,
            v,
            scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
        )
        return (output, sums, None) if return_attn_probs else output

    def varlen(  # noqa: PLR0913
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor | WithSums:
        """q (N, H, D), k and v (N, G, D), boundaries of documents int32; returns (N, H, D), and if
        asked (H, N)."""
        bounds = cu_seqlens_q.tolist()
        lengths = cu_seqlens_q.diff().tolist()
        calls.append(("varlen", lengths))
        assert dropout_p == 0.0
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert bounds == cu_seqlens_k.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(q) == len(k)
        assert int(max_seqlen_q) == int(max_seqlen_k) == max(lengths)
        documents = [
            _attention(
                q[None, start:end],
                k[None, start:end],
                v[None, start:end],
                scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                softcap=softcap,
            )
            for start, end in pairwise(bounds)
        ]
        output = torch.cat([own[0] for own, _ in documents])
        sums = torch.cat([own[0] for _, own in documents], dim=1)
        return (output, sums, None) if return_attn_probs else output

    return dense, varlen


def _of_version_3(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def version_3(  # noqa: PLR0913
        *tensors: Any,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        of_documents: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        }
        output, sums, _ = kernel(
            *tensors,
            **{key: value for key, value in of_documents.items() if value is not None},
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            deterministic=deterministic,
            return_attn_probs=True,
        )
        return output, sums

    return version_3


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention whose causal mask ends at the last query and the last key together, and the
    logarithms of its denominators, (B, H, T)."""
    query_BHTD = q.transpose(1, 2)
    groups = q.shape[2] // k.shape[2]
    key_BHSD, value_BHSD = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k, v))
    scores_BHTS = query_BHTD @ key_BHSD.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    count, keys = q.shape[1], k.shape[1]
    ahead_TS = torch.arange(keys) - (torch.arange(count) + keys - count)[:, None]
    left, right = window_size
    hidden_TS = (ahead_TS > 0) if causal else torch.zeros_like(ahead_TS, dtype=torch.bool)
    if left >= 0:
        hidden_TS |= -ahead_TS > left
    if right >= 0:
        hidden_TS |= ahead_TS > right
    scores_BHTS = scores_BHTS.masked_fill(hidden_TS, float("-inf"))
    output_BHTD = torch.softmax(scores_BHTS, dim=-1) @ value_BHSD
    return output_BHTD.transpose(1, 2), scores_BHTS.logsumexp(-1)
