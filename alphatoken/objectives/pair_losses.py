"""Preference losses as pure functions of sums over the two responses of a pair, and the table of
objectives made of them.

A new objective is a function here, its entry in `PAIR_OBJECTIVES`, and one in `config.objectives`.

Shape legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from alphatoken.config.choices import register
from alphatoken.config.objectives import OBJECTIVE_TRAITS, OPTIONAL_KEYS, ObjectiveTraits
from alphatoken.config.preference import PreferenceConfig


@dataclass(frozen=True)
class Branch:
    """One response of every pair, as sums over its tokens, each weighed by the mask; (P,) each."""

    nll_P: Tensor
    """Sums of the model's losses."""
    reference_P: Tensor
    """Sums of the reference's losses; zero for objectives without a reference."""
    tokens_P: Tensor

    @property
    def mean_nll(self) -> Tensor:
        """Loss per token; 0 where there is none."""
        return self.nll_P / torch.where(self.tokens_P > 0, self.tokens_P, 1.0)


@dataclass(frozen=True)
class Pairs:
    """Both responses of every pair."""

    chosen: Branch
    rejected: Branch

    def branch(self, name: Literal["chosen", "rejected"]) -> Branch:
        """The response of that name."""
        return self.chosen if name == "chosen" else self.rejected

    @property
    def comparable(self) -> Tensor:
        """Whether both have a token: only then is there a mean to compare."""
        return (self.chosen.tokens_P > 0) & (self.rejected.tokens_P > 0)


def log_ratio(branch: Branch) -> Tensor:
    """log of model over reference probability: sum of m (r - l), (P,)."""
    return branch.reference_P - branch.nll_P


def log_probability(branch: Branch) -> Tensor:
    """log of the model's probability: - sum of m l, (P,)."""
    return -branch.nll_P


def mean_log_probability(branch: Branch) -> Tensor:
    """log of the model's probability per token, (P,); 0 where there is none."""
    return -branch.mean_nll


def length_weights(document_R: Tensor, counts_D: Tensor, earlier_D: Tensor, decay: float) -> Tensor:
    """`decay` where a token lies beyond the length of its pair's shorter response, else 1, (R,)
    float32: what it counts in the model's log-probability. LD-DPO, Liu et al., arXiv 2409.06411,
    its alpha; as in TRL and LLaMA-Factory the reference's log-probability is not decayed.

    `document_R` int64 numbers the documents, 2 i and 2 i + 1 those of pair i, of response tokens
    that lie together and in order for each document. `counts_D` int64 are the response tokens of
    each, `earlier_D` those before the first of `document_R`, where these are a part of them.
    """
    index_R = torch.arange(len(document_R), device=document_R.device)
    first_D = torch.zeros_like(counts_D)
    first_D.scatter_reduce_(0, document_R, index_R, "amin", include_self=False)
    place_R = index_R - first_D[document_R] + earlier_D[document_R]
    beyond_R = place_R >= counts_D.view(-1, 2).amin(1)[document_R // 2]
    return torch.where(beyond_R, decay, 1.0)


def dpo_margin(pairs: Pairs, beta: float) -> Tensor:
    """s = beta (log-ratio of chosen - log-ratio of rejected)."""
    return beta * (log_ratio(pairs.chosen) - log_ratio(pairs.rejected))


def dpo(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(s) - e log sigmoid(-s): Rafailov et al., arXiv 2305.18290, Eq. 7;
    conservative if e > 0."""
    s_P = dpo_margin(pairs, beta)
    return (1 - label_smoothing) * F.softplus(-s_P) + label_smoothing * F.softplus(s_P)


def alpha_dpo_weight(full: Pairs, beta: float) -> Tensor:
    """omega = beta sigmoid(-s) with s over all response tokens, detached: minus d dpo / d log-ratio
    of chosen."""
    return (beta * torch.sigmoid(-dpo_margin(full, beta))).detach()


def alpha_dpo(
    kept: Pairs, omega_P: Tensor, normalisation: Literal["sum", "mean_kept"] = "sum"
) -> Tensor:
    """omega (sum_t m+_t l+_t - sum_t m-_t l-_t), or of means over kept tokens: AlphaToken, arXiv
    2606.01635, Eq. 14."""
    if normalisation == "sum":
        return omega_P * (kept.chosen.nll_P - kept.rejected.nll_P)
    return omega_P * (kept.chosen.mean_nll - kept.rejected.mean_nll)


def ipo(pairs: Pairs, beta: float) -> Tensor:
    """(log-ratio of chosen - log-ratio of rejected - 1 / (2 beta))^2: Azar et al., arXiv
    2310.12036, Eq. 17."""
    return (dpo_margin(pairs, 1.0) - 0.5 / beta).square()


def hinge(pairs: Pairs, beta: float) -> Tensor:
    """max(0, 1 - s): SLiC-HF's loss (Zhao et al., arXiv 2305.10425) on log-ratios, as in Liu et
    al., 2309.06657."""
    return F.relu(1 - dpo_margin(pairs, beta))


def simpo(pairs: Pairs, beta: float, margin: float) -> Tensor:
    """-log sigmoid(beta (mean l- - mean l+) - gamma): Meng et al., arXiv 2405.14734, Eq. 6; means
    over kept tokens.

    0 where a branch has no token.
    """
    reward_P = beta * (pairs.rejected.mean_nll - pairs.chosen.mean_nll) - margin
    return torch.where(pairs.comparable, F.softplus(-reward_P), 0.0)


def orpo(pairs: Pairs, beta: float) -> Tensor:
    """-lambda log sigmoid(log of the odds ratio): Hong et al., arXiv 2403.07691, Eq. 7, with lambda
    = `beta`.

    odds = p / (1 - p) with p = exp(-mean loss of kept tokens). 0 where a branch has no token.
    """
    difference_P = _log_odds(pairs.chosen) - _log_odds(pairs.rejected)
    return torch.where(pairs.comparable, beta * F.softplus(-difference_P), 0.0)


def _log_odds(branch: Branch) -> Tensor:
    # A certain response has infinite odds; and the gradient of where() must be finite on the
    # side not taken, too.
    nll_P = torch.where(branch.tokens_P > 0, branch.mean_nll, 1.0).clamp_min(
        torch.finfo(torch.float32).eps
    )
    return -nll_P - torch.log(-torch.expm1(-nll_P))


def cpo(pairs: Pairs, beta: float) -> Tensor:
    """-log sigmoid(beta (sum l- - sum l+)): Xu et al., arXiv 2401.08417, Eq. 4, the part of it on
    both branches."""
    return F.softplus(beta * (pairs.chosen.nll_P - pairs.rejected.nll_P))


PairLoss = Callable[[Pairs, Pairs, PreferenceConfig], Tensor]
"""Called with sums over the kept tokens, sums over all response tokens, and section `preference`;
returns the loss of each pair, (P,). Derivatives are autograd's, so the sums must stay in the graph.
"""


@dataclass(frozen=True, kw_only=True)
class PairObjective:
    """A preference objective: what is minimised, and what it compares two responses by."""

    loss: PairLoss
    reward: Callable[[Branch], Tensor]
    """What the objective raises for the chosen and lowers for the rejected response, (P,); reported
    times beta."""
    held_out_loss: PairLoss | None = None
    """What is reported of held-out pairs; None: the loss itself, with all tokens kept."""


PAIR_OBJECTIVES: dict[str, PairObjective] = {
    "alpha_dpo": PairObjective(
        loss=lambda kept, full, settings: alpha_dpo(
            kept,
            omega_P=alpha_dpo_weight(full, settings.scale),
            normalisation=settings.normalisation,
        ),
        reward=log_ratio,
        # At all-ones masks it has the gradient of DPO, but not its value.
        held_out_loss=lambda kept, full, settings: dpo(kept, settings.scale),
    ),
    "dpo": PairObjective(
        loss=lambda kept, full, settings: dpo(kept, settings.scale, settings.label_smoothing),
        reward=log_ratio,
    ),
    "ipo": PairObjective(
        loss=lambda kept, full, settings: ipo(kept, settings.scale), reward=log_ratio
    ),
    "hinge": PairObjective(
        loss=lambda kept, full, settings: hinge(kept, settings.scale), reward=log_ratio
    ),
    "simpo": PairObjective(
        loss=lambda kept, full, settings: simpo(kept, settings.scale, settings.margin),
        reward=mean_log_probability,
    ),
    "orpo": PairObjective(
        loss=lambda kept, full, settings: orpo(kept, settings.scale), reward=mean_log_probability
    ),
    "cpo": PairObjective(
        loss=lambda kept, full, settings: cpo(kept, settings.scale), reward=log_probability
    ),
}


def register_objective(
    name: str,
    objective: PairObjective,
    *,
    needs_reference: bool,
    default_beta: float = 0.1,
    default_nll_weight: float = 0.0,
    reads: Iterable[str] = (),
) -> None:
    """Makes an objective known as `preference.objective: name`, in this process.

    The other arguments are as in `ObjectiveTraits`. Every rank must register it before the
    configuration is read. Raises ValueError where the name is taken, or `reads` names something
    else than `OPTIONAL_KEYS`.
    """
    unknown = set(reads) - set(OPTIONAL_KEYS)
    if unknown:
        raise ValueError(
            f"objective {name!r} reads {sorted(unknown)}; keys that only some objectives read are "
            f"{', '.join(OPTIONAL_KEYS)}"
        )
    traits = ObjectiveTraits(
        needs_reference=needs_reference,
        default_beta=default_beta,
        default_nll_weight=default_nll_weight,
        reads=frozenset(reads),
    )
    register(OBJECTIVE_TRAITS, name, traits, notion="preference objective")
    PAIR_OBJECTIVES[name] = objective
