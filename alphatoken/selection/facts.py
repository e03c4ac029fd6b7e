"""What is known of response tokens before any is selected."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Assessment(TypedDict):
    """What is known about a micro-batch's response tokens before any is chosen; nothing carries a
    graph."""

    response_BT: Tensor
    protected_BT: Tensor
    """Targets that end a turn."""
    nll_BT: Tensor
    """Token losses, float32, zero off the response."""
    rank_BT: Tensor
    """What the selection policy ranks by."""
    values: dict[str, Tensor]
    """The terms and the composite, (B, T) each; empty without a scorer."""
