"""Published losses of supervised fine-tuning, from a model's own logits by their formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dynamic_fine_tuning(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-sg(p) log p of each token: `loss_type="dft"` of TRL, `use_dft_loss` of LLaMA-Factory."""
    p_R = logits_RV.softmax(-1).gather(1, targets_R[:, None])[:, 0]
    return -p_R.detach() * p_R.log()


def entropy_adaptive(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-sg(H / 3) log p, H the entropy of the 20 likeliest tokens alone: `use_eaft_loss` of
    LLaMA-Factory."""
    p_RV = logits_RV.softmax(-1)
    share_RK = p_RV.sort(-1, descending=True).values[:, :20]
    share_RK = share_RK / share_RK.sum(-1, keepdim=True)
    entropy_R: Tensor = torch.special.entr(share_RK).sum(-1).detach()
    weight_R: Tensor = entropy_R / 3
    return -weight_R * p_RV.gather(1, targets_R[:, None])[:, 0].log()


def token_adaptive(logits_RV: Tensor, targets_R: Tensor, *, tau: float) -> Tensor:
    """-sg(max(p^(1/tau), 0.01)) log p: TALR."""
    p_R = logits_RV.softmax(-1).gather(1, targets_R[:, None])[:, 0]
    return -(p_R.detach() ** (1 / tau)).clamp_min(0.01) * p_R.log()


def probable_only(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-log p where p >= 0.1, else nothing: ProFit with `prob_threshold: 0.1`."""
    p_R = logits_RV.softmax(-1).gather(1, targets_R[:, None])[:, 0]
    return torch.where(p_R >= 0.1, -p_R.log(), 0.0)


def cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """-log p."""
    return torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "dft": dynamic_fine_tuning,
    "eaft": entropy_adaptive,
    "profit": probable_only,
}
"""The loss of each token, (R,), of logits (R, V) and targets (R,); all are divided by the number of
response tokens of the whole step."""
