"""Means, deviations, covariances and correlations of token values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from alphatoken.values.algebra import TERMS

CONTRAST = ("direct_contrast", "causal_contrast")


class ValueColumns:
    """The columns whose Gram matrix gives all means, deviations and covariances of values: a one,
    the terms that a run has, and the composite. `contrast` (c) is what the contrast terms count
    negatively in adaptation."""

    def __init__(self, contrast: float) -> None:
        self.terms = tuple(name for name in TERMS if contrast or name not in CONTRAST)
        self.names = ("one", *self.terms, "composite")
        signs = {name: -contrast if name in CONTRAST else 1.0 for name in self.terms}
        proxies = [name for name in self.terms if name.endswith("proxy")]
        self.parts = {
            "adaptation": {name: signs[name] for name in self.terms if name not in proxies},
            "stability": {name: signs[name] for name in proxies},
        }
        """By part of the value, what each of its terms counts in it."""

    def part_sums(self, table_RC: Tensor) -> Tensor:
        """Adaptation and stability of every token, before any weight: (R, 2)."""
        sums = []
        for terms in self.parts.values():
            part_R = torch.zeros_like(table_RC[:, 0])
            for place, weight in zip(self._places(terms), terms.values(), strict=True):
                part_R.add_(table_RC[:, place], alpha=weight)
            sums.append(part_R)
        return torch.stack(sums, dim=1)

    def moments(self, moment_CC: Tensor) -> dict[str, float]:
        """Means and deviations of the terms, from the Gram matrix over the number of tokens.

        A term that was not computed is NaN there and absent here.
        """
        metrics: dict[str, float] = {}
        for index, name in enumerate(self.names[1:], start=1):
            mean = float(moment_CC[0, index])
            if not math.isnan(mean):
                variance = float(moment_CC[index, index]) - mean**2
                metrics |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(variance, 0.0))}
        return metrics

    def part_deviations(self, moment_CC: Tensor) -> dict[str, float]:
        """Standard deviations of adaptation and stability."""
        covariance_CC = _covariance(moment_CC)
        deviations = {}
        for part, terms in self.parts.items():
            own, weight_P = self._places(terms), moment_CC.new_tensor(list(terms.values()))
            weighted_PP = covariance_CC[own][:, own] * torch.outer(weight_P, weight_P)
            deviations[f"{part}_std"] = float(weighted_PP.sum().clamp_min(0).sqrt())
        return deviations

    def variance_shares(
        self, moment_CC: Tensor, part_weights: tuple[float, float]
    ) -> dict[str, float]:
        """Each term's share in the variance of the composite.

        The composite is the sum of the terms times their weights, so their weighted covariances
        with it add up to its variance. Shares are 0 where the composite does not vary.
        """
        covariance_CC = _covariance(moment_CC)
        variance = float(covariance_CC[-1, -1])
        shares = {}
        for part_weight, terms in zip(part_weights, self.parts.values(), strict=True):
            for name, weight in terms.items():
                covariance = float(covariance_CC[self.names.index(name), -1])
                share = part_weight * weight * covariance / variance if variance > 0 else 0.0
                shares[f"{name}_share"] = share
        return shares

    def _places(self, names: Iterable[str]) -> list[int]:
        return [self.names.index(name) for name in names]


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
