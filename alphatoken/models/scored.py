"""Which weights of a model are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alphatoken.errors import UserError

Segment = int | Literal["embeddings", "norm", "head"]
"""A part of a decoder that is run on its own: a layer by its index, what comes before the layers,
or after."""


@dataclass(frozen=True)
class ScoredLinear:
    """One linear of the scored set S."""

    path: str
    """Dotted path inside its decoder layer."""
    is_value: bool
    """Whether the causal path runs through it."""
    value_rows: Tensor | None = None
    """Which of its output rows are values; None is all."""
    feeds: str | None = None
    """Path of the linear that takes its output and nothing else: an adapter's B, for its A."""
    transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2 does."""
    name: str = ""
    """Full parameter name, for example `model.layers.27.self_attn.v_proj.weight`."""
    layer: int = -1
    """Index of its decoder layer."""


ParameterSet = Literal["linears", "norms", "all"]


@dataclass(frozen=True)
class ScoredParameter:
    """One use of a parameter that values are computed for. Tied embeddings and head are two uses of
    one name."""

    name: str
    """Full parameter name."""
    segment: Segment
    path: str
    """Dotted path inside the segment's module."""
    kind: Literal["linear", "norm", "embedding", "other"]
    """What module owns it. Of `other` (experts, convolutions, ...) there is no gradient by
    position, so no Fisher."""


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def kind_of(owner: nn.Module) -> Literal["linear", "norm", "embedding", "other"]:
    if isinstance(owner, nn.Linear | Conv1D):
        return "linear"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    gated = "Gated" in type(owner).__name__  # its gradient by position would need the gate too
    return "norm" if is_norm(owner) and not gated else "other"


def scored_depth(layers: int | str, num_layers: int) -> int:
    """Number of scored layers for `valuation.layers`. Raises UserError when the model has fewer."""
    if layers == "all":
        return num_layers
    assert isinstance(layers, int)
    if layers > num_layers:
        raise UserError(
            f"valuation.layers={layers}, but the model has only {num_layers} decoder layers; use "
            f"at most {num_layers}, or 'all'"
        )
    return layers
