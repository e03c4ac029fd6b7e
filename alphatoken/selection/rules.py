"""The rules that others have published for choosing or weighing response tokens, as pure functions.

Each is one formula with its source; `selection.policy` and `selection.weights` give them names, and
docs/rules.md says how each is switched on and what differs from the published procedure.

Shape legend: R response positions in order of (row, position). A token's loss is in nats, so its
probability is p = exp(-loss). `sequence_R` and `group_R` are int64 numbers of the sequence of each
token and of the group that its selection chooses among; a sequence lies in one group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TALR_FLOOR = 0.01
"""The smallest weight that TALR gives."""
EAFT_SCALE = 3.0
"""What EAFT divides the entropy by: about ln 20, the entropy of 20 equally likely tokens."""
ROUNDING = 1e-9
"""Scores that differ by less than this share of their mean are equal."""


def power_weights(nll_R: Tensor, power: float) -> Tensor:
    """p^a, (R,): Dynamic Fine-Tuning with a = 1 (Wu et al., arXiv 2508.05629), plain cross-entropy
    with a = 0.

    Source: `dft_loss` of TRL and of LLaMA-Factory, -(p detached) log p over all response tokens.
    """
    return torch.exp(-power * nll_R)


def talr_weights(nll_R: Tensor, sequence_R: Tensor, group_R: Tensor) -> Tensor:
    """max(p^(1 / tau), 0.01), with tau the median over a group's sequences of their mean loss,
    (R,): Token-Adaptive Loss Reweighting (Lin et al., arXiv 2509.20758).

    Where tau is zero only tokens without loss have weight 1. An even number of sequences has the
    mean of the two middle ones as its median. Source: the formula as others restate it; the
    paper's own equation and code were not at hand.
    """
    mean_S = sequence_means(nll_R, sequence_R)
    tau_R = torch.zeros_like(nll_R, dtype=torch.float64)
    for group in group_R.unique():
        own_R = group_R == group
        tau_R[own_R] = mean_S[sequence_R[own_R].unique()].quantile(0.5)
    tau_R.clamp_min_(torch.finfo(torch.float64).tiny)
    return torch.exp(-nll_R.double() / tau_R).clamp_min(TALR_FLOOR)


def entropy_weights(entropy_R: Tensor) -> Tensor:
    """Entropy in nats of the 20 likeliest tokens' renormalised probabilities, divided by 3, (R,):
    Entropy-Adaptive Fine-Tuning (Diao et al., arXiv 2601.02151).

    Source: `_eaft_cross_entropy` of LLaMA-Factory with `eaft_alpha: 1`; natural logarithm, no
    clamp. `entropy_R` is as `models.head.head_entropy` computes it.
    """
    return entropy_R / EAFT_SCALE


def gibbs_weights(score_R: Tensor, sequence_R: Tensor, temperature: float) -> Tensor:
    """c w_t with w = n softmax(s / T) over the n tokens of a sequence, s their scores in units of
    their standard deviation, and c = min(1, sqrt(Var(s) / Var(w s))), (R,): VCORE (Gong et al.,
    arXiv 2510.27462).

    w gains most at a given divergence from uniform weights; c keeps the variance of the update at
    that of uniform weights. No sequence's weights sum to more than n, and equal scores have weight
    1. Source: `vcore_loss` of the released code for w; for c the variances it has in comments,
    capped at 1 as there.
    """
    mean_R, deviation_R = _moments(score_R.double(), sequence_R)
    varies_R = deviation_R > ROUNDING * mean_R.abs()
    unit_R = torch.where(varies_R, score_R.double() / deviation_R, 0.0)
    weight_R = _softmax_weights(unit_R / temperature, sequence_R)
    _, uniform_R = _moments(unit_R, sequence_R)
    _, weighed_R = _moments(weight_R * unit_R, sequence_R)
    control_R = torch.where(weighed_R > 0, uniform_R / weighed_R, 1.0).clamp_max(1.0)
    return control_R * weight_R


def below_mean_probability(
    nll_R: Tensor,
    sequence_R: Tensor,
    *,
    sequences: int = 0,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How far p is below the mean p of its response, minus infinity where it is not, (R,): ConfPO
    trains on the tokens for which this is finite (Yoon et al., arXiv 2506.08712).

    `total` adds up what there is of each of `sequences` responses where others have tokens of them,
    too. Source: `cpo_loss_confpo` of the released code, strictly below the arithmetic mean.
    """
    probability_R = torch.exp(-nll_R.double())
    mean_S = sequence_means(probability_R, sequence_R, sequences, total)
    below_R = mean_S[sequence_R] - probability_R
    return torch.where(below_R > 0, below_R, -torch.inf)


def excess_loss(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """The loss above the reference's, of any shape: Rho-1 (Lin et al., arXiv 2404.07965, Eq. 3).

    Also the score of Token Cleaning (Pang et al., arXiv 2502.01968), which ranks all tokens of a
    data set together, and of Selective-DPO (Dong, arXiv 2507.07725) for chosen responses.
    """
    return nll - reference_nll


def retrospective_excess_loss(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """By how much the loss has fallen since the reference, of any shape: ssToken (Qin et al., arXiv
    2510.18250), where the reference is an earlier state of the model; without its attention part.

    Also the score of Selective-DPO (Dong, arXiv 2507.07725) for rejected responses.
    """
    return reference_nll - nll


def sequence_means(
    number_R: Tensor,
    sequence_R: Tensor,
    sequences: int = 0,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean of each sequence 0, 1, ..., (S,) float64; 0 where it has no token. `sequences` and
    `total` as in `below_mean_probability`."""
    count_S = sequence_R.bincount(minlength=sequences).double()
    sum_S = torch.zeros_like(count_S).index_add_(0, sequence_R, number_R.double())
    if total is not None:
        sum_S, count_S = total(torch.stack([sum_S, count_S]))
    return sum_S / count_S.clamp_min(1)


def _softmax_weights(score_R: Tensor, sequence_R: Tensor) -> Tensor:
    """n softmax(score) over the n tokens of each sequence, (R,): 1 on average."""
    highest_S = torch.zeros_like(sequence_R.bincount(), dtype=score_R.dtype)
    highest_S.scatter_reduce_(0, sequence_R, score_R, "amax", include_self=False)
    raw_R = torch.exp(score_R - highest_S[sequence_R])
    return raw_R / sequence_means(raw_R, sequence_R)[sequence_R]


def _moments(number_R: Tensor, sequence_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (over n) of each token's sequence, (R,) float64 each."""
    mean_R = sequence_means(number_R, sequence_R)[sequence_R]
    variance_S = sequence_means((number_R - mean_R).square(), sequence_R)
    return mean_R, variance_S.sqrt()[sequence_R]
