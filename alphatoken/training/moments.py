"""Means, deviations and correlations."""

from __future__ import annotations

import math

from torch import Tensor

from alphatoken.values.algebra import TERMS

# What is multiplied with each other: the Gram matrix of these columns gives all means,
# deviations and covariances.
COLUMNS = ("one", *TERMS, "composite")


def moments(moment_CC: Tensor) -> dict[str, float]:
    """Means and deviations of the terms; a term that was not computed is absent."""
    metrics: dict[str, float] = {}
    for index, name in enumerate(COLUMNS[1:], start=1):
        mean = float(moment_CC[0, index])
        if not math.isnan(mean):
            variance = float(moment_CC[index, index]) - mean**2
            metrics |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(variance, 0.0))}
    return metrics


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
