"""Means, deviations, covariances and correlations of token values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphatoken.util.metrics import declare
from alphatoken.values.algebra import TERMS

# The Gram matrix of these columns gives all means, deviations and covariances.
COLUMNS = ("one", *TERMS, "composite")
PARTS = {
    "adaptation": ("direct_target", "causal_target"),
    "stability": ("direct_proxy", "causal_proxy"),
}
"""The terms that each part of the value is the sum of."""

declare(
    "{direct,causal}_{target,proxy}_{mean,std}",
    "mean and standard deviation of a term over all response tokens",
    "value",
)
declare(
    "composite_{mean,std}", "mean and standard deviation of the value of response tokens", "value"
)
declare(
    "{direct_target,causal_target,direct_proxy,causal_proxy,composite}_{mean,std}_{chosen,rejected}",
    "mean and standard deviation of a term or of the value over one branch's response tokens",
    "value",
)
declare("{adaptation,stability}_std", "standard deviation of the part before any weight", "value")
declare(
    "{direct,causal}_{target,proxy}_share",
    "share of a term in the composite's variance (its covariance with it); the four add up to 1",
)


def columns_of(names: tuple[str, ...]) -> list[int]:
    """Places of columns in the Gram matrix."""
    return [COLUMNS.index(name) for name in names]


def moments(moment_CC: Tensor) -> dict[str, float]:
    """Means and deviations of the terms, from the Gram matrix over the number of tokens.

    A term that was not computed is NaN there and absent here.
    """
    metrics: dict[str, float] = {}
    for name in COLUMNS[1:]:
        index = COLUMNS.index(name)
        mean = float(moment_CC[0, index])
        if not math.isnan(mean):
            variance = float(moment_CC[index, index]) - mean**2
            metrics |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(variance, 0.0))}
    return metrics


def part_deviations(moment_CC: Tensor) -> dict[str, float]:
    """Standard deviations of adaptation and stability."""
    covariance_CC = _covariance(moment_CC)
    deviations = {}
    for part, names in PARTS.items():
        own = columns_of(names)
        variance = covariance_CC[own][:, own].sum().clamp_min(0)
        deviations[f"{part}_std"] = float(variance.sqrt())
    return deviations


def variance_shares(moment_CC: Tensor, part_weights: tuple[float, float]) -> dict[str, float]:
    """Each term's share in the variance of the composite.

    The composite is the sum of the terms times their part's weight, so their weighted covariances
    with it add up to its variance. Shares are 0 where the composite does not vary.
    """
    covariance_CC = _covariance(moment_CC)
    composite = COLUMNS.index("composite")
    variance = float(covariance_CC[composite, composite])
    shares = {}
    for weight, names in zip(part_weights, PARTS.values(), strict=True):
        for name in names:
            covariance = float(covariance_CC[COLUMNS.index(name), composite])
            shares[f"{name}_share"] = weight * covariance / variance if variance > 0 else 0.0
    return shares


def rank_correlation(first_R: Tensor, second_R: Tensor) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean rank; 0 where one of them
    does not vary."""
    centred = []
    for values_R in (first_R, second_R):
        _, place_R, count_U = values_R.unique(return_inverse=True, return_counts=True)
        rank_U = count_U.cumsum(0).double() - 0.5 * count_U
        centred.append(rank_U[place_R] - 0.5 * len(values_R))
    norm = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norm) if norm > 0 else 0.0


def _covariance(moment_CC: Tensor) -> Tensor:
    mean_C = moment_CC[0]
    return moment_CC - torch.outer(mean_C, mean_C)
