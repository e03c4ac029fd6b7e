"""What tokens are ranked by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Policy = Literal["top_value", "random", "loss", "low_perplexity", "excess_loss", "all"]


def ranking(
    policy: Policy,
    composite_BT: Tensor | None,
    nll_BT: Tensor,
    noise_BT: Tensor | None = None,
    reference_nll_BT: Tensor | None = None,
) -> Tensor:
    """What a policy ranks tokens by, (B, T), higher is kept first.

    `top_value` needs the composite value, `random` the noise, `excess_loss` the reference's losses
    (Rho-1, Lin et al., arXiv 2404.07965, Eq. 3); `all` keeps every token whatever its rank.
    """
    match policy:
        case "top_value":
            assert composite_BT is not None, "top_value needs a scorer"
            return composite_BT
        case "random":
            assert noise_BT is not None, "the random policy needs noise"
            return noise_BT
        case "excess_loss":
            assert reference_nll_BT is not None, "excess_loss needs a reference"
            return nll_BT - reference_nll_BT
        case "low_perplexity":
            return -nll_BT
        case "loss" | "all":
            return nll_BT
