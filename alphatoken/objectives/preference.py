"""The DPO family on pairs of responses, over masked token sums: objectives, their coefficients,
what is reported.

Shape legend: P pairs, B rows, T loss positions, R kept positions. l is a token's loss under the
model, r under the reference. Sums are float64: differences of long sums matter here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.preference import BRANCHES, REFERENCE_FREE, PreferenceConfig
from alphatoken.objectives.pair_losses import (
    Branch,
    Pairs,
    alpha_dpo,
    alpha_dpo_weight,
    cpo,
    dpo,
    hinge,
    ipo,
    orpo,
    simpo,
)

# Rewards nearer to each other than this are equal: float32 losses of the same weights, summed
# in another order.
ROUNDING = 1e-6


class PreferenceObjective:
    """An objective on pairs, summed over pairs and divided by their number.

    Documents 2 i and 2 i + 1 of a batch are the chosen and the rejected response of its pair i;
    unless the objective is reference-free, `reference_nll` (B, T) has the reference's token losses.
    """

    branches: tuple[str, ...] = BRANCHES

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config
        self._with_reference = config.objective not in REFERENCE_FREE

    def loss(self, kept: Pairs, every: Pairs) -> Tensor:
        """The objective of each pair, (P,), on `kept` tokens; `every` one of the response weighs
        pairs of alpha_dpo."""
        config, beta = self._config, self._config.scale
        match config.objective:
            case "alpha_dpo":
                loss_P = alpha_dpo(kept, alpha_dpo_weight(every, beta), config.normalisation)
            case "dpo":
                loss_P = dpo(kept, beta, config.label_smoothing)
            case "ipo":
                loss_P = ipo(kept, beta)
            case "hinge":
                loss_P = hinge(kept, beta)
            case "simpo":
                loss_P = simpo(kept, beta, config.margin)
            case "orpo":
                loss_P = orpo(kept, beta)
            case "cpo":
                loss_P = cpo(kept, beta)
        return loss_P + config.chosen_nll_weight * kept.chosen.mean_nll

    def coefficients(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> Tensor:
        coefficient_PB = self._derivatives(self._every(batch, nll_BT, response_BT))
        coefficient_BT = torch.zeros_like(nll_BT)
        coefficient_BT[response_BT] = coefficient_PB.flatten().float()[
            batch["document_ids"][response_BT]
        ]
        return coefficient_BT

    def total(
        self,
        batch: Batch,
        nll_BT: Tensor,
        response_BT: Tensor,
        weight_BT: Tensor,
        kept_nll_R: Tensor,
    ) -> Tensor:
        kept = self._pairs(batch, weight_BT, kept_nll_R)
        return self.loss(kept, self._every(batch, nll_BT, response_BT)).sum().float()

    def denominator(self, kept_tokens: int, rows: int) -> int:
        return rows

    def metrics(
        self, batch: Batch, nll_BT: Tensor, response_BT: Tensor, weight_BT: Tensor
    ) -> dict[str, Tensor]:
        every = self._every(batch, nll_BT, response_BT)
        kept = self._pairs(batch, weight_BT, nll_BT[weight_BT > 0])
        metrics = {
            **self._rewards(every),
            **{f"{name}_masked": reward_P for name, reward_P in self._rewards(kept).items()},
            "omega": self._derivatives(every)[:, 0],
        }
        if self._with_reference:
            metrics["kl_estimate"] = self._kl_estimate(batch, nll_BT, response_BT, every)
        for name in BRANCHES:
            of_all, of_kept = getattr(every, name), getattr(kept, name)
            share_P = of_kept.tokens_P / of_all.tokens_P.clamp_min(1)
            metrics |= {f"length_{name}": of_all.tokens_P, f"kept_share_{name}": share_P}
        return metrics

    def evaluation(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> dict[str, Tensor]:
        """At all-ones masks, where `alpha_dpo` has DPO's gradient and so is reported by DPO's
        loss."""
        every = self._every(batch, nll_BT, response_BT)
        alpha = self._config.objective == "alpha_dpo"
        longer_P = every.chosen.tokens_P - every.rejected.tokens_P
        rewards = self._rewards(every)
        return {
            "loss": dpo(every, self._config.scale) if alpha else self.loss(every, every),
            "rewards_margin": rewards["rewards_margin"],
            "rewards_accuracy": rewards["rewards_accuracy"],
            "length_accuracy": _preferred(longer_P),
        }

    def _every(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> Pairs:
        """Sums over all response tokens."""
        return self._pairs(batch, response_BT.to(nll_BT.dtype), nll_BT[response_BT])

    def _pairs(self, batch: Batch, weight_BT: Tensor, nll_R: Tensor) -> Pairs:
        """Sums over the tokens whose weight is not zero; `nll_R` are their losses."""
        kept_BT = weight_BT > 0
        weight_R, document_R = weight_BT[kept_BT].double(), batch["document_ids"][kept_BT]
        reference_R = (
            batch["reference_nll"][kept_BT].double()
            if self._with_reference
            else torch.zeros_like(weight_R)
        )

        def sums(value_R: Tensor) -> Tensor:
            nothing_D = torch.zeros(len(batch["rows"]), dtype=torch.float64, device=value_R.device)
            return nothing_D.index_add(0, document_R, weight_R * value_R).view(-1, len(BRANCHES))

        columns = [
            sums(column_R) for column_R in (nll_R.double(), reference_R, torch.ones_like(weight_R))
        ]
        return Pairs(
            *(
                Branch(*(column_PB[:, branch] for column_PB in columns))
                for branch in range(len(BRANCHES))
            )
        )

    def _derivatives(self, every: Pairs) -> Tensor:
        """d objective / d (sum_t l_t) of both branches of each pair at all-ones masks, (P, 2)."""
        with torch.enable_grad():
            sums = [
                branch.nll_P.detach().requires_grad_() for branch in (every.chosen, every.rejected)
            ]
            kept = Pairs(
                replace(every.chosen, nll_P=sums[0]), replace(every.rejected, nll_P=sums[1])
            )
            return torch.stack(torch.autograd.grad(self.loss(kept, every).sum(), sums), dim=1)

    def _rewards(self, pairs: Pairs) -> dict[str, Tensor]:
        """What the objective compares of each branch, beta times a log-ratio or a log-probability,
        and by how much."""
        rewards = []
        for branch in (pairs.chosen, pairs.rejected):
            if self._with_reference:
                score_P = branch.log_ratio
            else:
                score_P = -(branch.nll_P if self._config.objective == "cpo" else branch.mean_nll)
            rewards.append(self._config.scale * score_P.detach())
        chosen_P, rejected_P = rewards
        return {
            "rewards_chosen": chosen_P,
            "rewards_rejected": rejected_P,
            "rewards_margin": chosen_P - rejected_P,
            "rewards_accuracy": _preferred(chosen_P - rejected_P),
        }

    def _kl_estimate(
        self, batch: Batch, nll_BT: Tensor, response_BT: Tensor, every: Pairs
    ) -> Tensor:
        """Mean over a pair's tokens of rho - 1 - log rho, where rho is reference over model
        probability.

        Its mean over the model's own samples is the divergence from the reference per token; these
        are given responses.
        """
        log_rho_R = (nll_BT - batch["reference_nll"])[response_BT].double()
        terms = self._pairs(batch, response_BT.to(nll_BT.dtype), torch.expm1(log_rho_R) - log_rho_R)
        tokens_P = (every.chosen.tokens_P + every.rejected.tokens_P).clamp_min(1)
        return (terms.chosen.nll_P + terms.rejected.nll_P) / tokens_P


def _preferred(difference_P: Tensor) -> Tensor:
    """1 where the first is preferred, 1/2 for a tie, else 0. What rounding leaves of equal losses
    is a tie."""
    return (torch.sign(torch.where(difference_P.abs() > ROUNDING, difference_P, 0.0)) + 1) / 2
