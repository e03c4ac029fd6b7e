"""The DPO family on pairs of responses, over masked token sums: objectives, their coefficients,
what is reported.

Shape legend: P pairs, D documents (two per pair), B rows, T loss positions, R kept positions. l is
a token's loss under the model, r under the reference. Sums are float64: differences of long sums
matter here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.preference import BRANCHES, BranchName, PreferenceConfig
from alphatoken.distributed.mesh import mesh
from alphatoken.distributed.sums import sum_of_parts
from alphatoken.objectives.base import KeptLosses, ResponseLosses
from alphatoken.objectives.pair_losses import PAIR_OBJECTIVES, Branch, Pairs, length_weights

# Rewards nearer to each other than this are equal: float32 losses of the same weights, summed
# in another order.
ROUNDING = 1e-6


class PreferenceObjective:
    """An objective on pairs, summed over pairs and divided by their number.

    Documents 2 i and 2 i + 1 of a batch are the chosen and the rejected response of its pair i;
    unless the objective is reference-free, `reference_nll` (B, T) has the reference's token losses.
    """

    branches: tuple[str, ...] = BRANCHES

    def __init__(self, settings: PreferenceConfig) -> None:
        self._settings = settings
        self._objective = PAIR_OBJECTIVES[settings.objective]

    def loss(self, *, kept: Pairs, full: Pairs) -> Tensor:
        """The objective of each pair, (P,), on the sums over its kept tokens; `full` are the sums
        over all response tokens."""
        loss_P = self._objective.loss(kept, full, self._settings)
        return loss_P + self._settings.chosen_nll_weight * kept.chosen.mean_nll

    def coefficients(self, losses: ResponseLosses) -> Tensor:
        coefficient_PB = self._derivatives(self._full(losses))
        document_R = losses.response_index.take(losses.batch["document_ids"])
        coefficient_R = coefficient_PB.flatten().float()[document_R]
        return losses.response_index.put(coefficient_R) * self._length_weights(losses)

    def total(self, losses: KeptLosses) -> Tensor:
        counted_R = losses.of_kept(self._length_weights(losses))
        kept = self._kept(losses, counted_R * losses.kept_nll_R)
        total = self.loss(kept=kept, full=self._full(losses)).sum().float()
        return total / mesh().sequence.size  # every rank that has a part of the pairs has all sums

    def denominator(self, counted_tokens: int, rows: int) -> int:
        return rows

    def metrics(self, losses: KeptLosses) -> dict[str, Tensor]:
        """Rewards, omega, divergence, lengths and kept shares of the pairs, each (P,)."""
        full = self._full(losses)
        counted_BT = self._length_weights(losses) * losses.nll_BT
        kept = self._kept(losses, losses.of_kept(counted_BT))
        metrics = {
            **self._rewards(full),
            **{f"{name}_masked": reward_P for name, reward_P in self._rewards(kept).items()},
            "omega": self._derivatives(full)[:, 0],
        }
        if self._settings.needs_reference:
            metrics["kl_estimate"] = self._kl_estimate(losses, full)
        for name in BRANCHES:
            tokens_P = full.branch(name).tokens_P
            metrics[f"length_{name}"] = tokens_P
            metrics[f"kept_share_{name}"] = kept.branch(name).tokens_P / tokens_P.clamp_min(1)
        return metrics

    def evaluation(self, losses: ResponseLosses) -> dict[str, Tensor]:
        """Reports the loss, the rewards' margin and accuracy, and the accuracy of preferring the
        longer response, all with every token kept."""
        full = self._full(losses)
        held_out_loss = self._objective.held_out_loss
        if held_out_loss is None:
            loss_P = self.loss(kept=full, full=full)
        else:
            loss_P = held_out_loss(full, full, self._settings)
        rewards = self._rewards(full)
        return {
            "loss": loss_P,
            "rewards_margin": rewards["rewards_margin"],
            "rewards_accuracy": rewards["rewards_accuracy"],
            "length_accuracy": _preferred(full.chosen.tokens_P - full.rejected.tokens_P),
        }

    def _full(self, losses: ResponseLosses) -> Pairs:
        """Sums over all response tokens."""
        counted_BT = self._length_weights(losses) * losses.nll_BT
        return self._of_responses(losses, losses.response_index.take(counted_BT))

    def _of_responses(self, losses: ResponseLosses, nll_R: Tensor) -> Pairs:
        """Sums over all response tokens, where `nll_R` are their losses."""
        index_R = losses.response_index.index_R
        return self._pairs(losses.batch, index_R, torch.ones_like(nll_R), nll_R)

    def _kept(self, losses: KeptLosses, nll_R: Tensor) -> Pairs:
        """Sums over the kept tokens, where `nll_R` are their losses."""
        weight_R = losses.of_kept(losses.weight_BT)
        return self._pairs(losses.batch, losses.kept_index_R, weight_R, nll_R)

    def _length_weights(self, losses: ResponseLosses) -> Tensor:
        """What each token's loss counts in its response's sum, (B, T) float32, 1 off the
        response."""
        weight_BT = torch.ones_like(losses.nll_BT)
        if self._settings.length_decay != 1:
            index, batch = losses.response_index, losses.batch
            document_R = index.take(batch["document_ids"])
            counts_D = document_R.bincount(minlength=len(batch["rows"]))
            earlier_D = torch.zeros_like(counts_D)
            if "whole_rows" in batch:
                counts_D, earlier_D = (
                    torch.tensor(counts, dtype=torch.int64, device=document_R.device)
                    for counts in (batch["document_counts"], batch["earlier_counts"])
                )
            decay = self._settings.length_decay
            weight_R = length_weights(document_R, counts_D, earlier_D, decay)
            weight_BT.view(-1).index_copy_(0, index.index_R, weight_R)
        return weight_BT

    def _pairs(self, batch: Batch, index_R: Tensor, weight_R: Tensor, nll_R: Tensor) -> Pairs:
        """Sums over the tokens at `index_R` of the B T positions, with these weights and losses."""
        weight_R = weight_R.double()
        document_R = batch["document_ids"].flatten().index_select(0, index_R)
        if self._settings.needs_reference:
            reference_R = batch["reference_nll"].flatten().index_select(0, index_R).double()
        else:
            reference_R = torch.zeros_like(weight_R)

        def sums(value_R: Tensor) -> Tensor:
            """Weighed sums by pair and branch, (P, branches)."""
            nothing_D = torch.zeros(len(batch["rows"]), dtype=torch.float64, device=value_R.device)
            own_D = nothing_D.index_add(0, document_R, weight_R * value_R)
            return sum_of_parts(own_D).view(-1, len(BRANCHES))

        nll_PB = sums(nll_R.double())
        reference_PB = sums(reference_R)
        tokens_PB = sums(torch.ones_like(weight_R))

        def branch(name: BranchName) -> Branch:
            index = BRANCHES.index(name)
            return Branch(
                nll_P=nll_PB[:, index],
                reference_P=reference_PB[:, index],
                tokens_P=tokens_PB[:, index],
            )

        return Pairs(chosen=branch("chosen"), rejected=branch("rejected"))

    def _derivatives(self, full: Pairs) -> Tensor:
        """d objective / d (sum_t l_t) of both branches of each pair at all-ones masks, (P, 2)."""
        with torch.enable_grad():
            chosen_P = full.chosen.nll_P.detach().requires_grad_()
            rejected_P = full.rejected.nll_P.detach().requires_grad_()
            kept = Pairs(
                chosen=replace(full.chosen, nll_P=chosen_P),
                rejected=replace(full.rejected, nll_P=rejected_P),
            )
            total = self.loss(kept=kept, full=full).sum()
            return torch.stack(torch.autograd.grad(total, (chosen_P, rejected_P)), dim=1)

    def _rewards(self, pairs: Pairs) -> dict[str, Tensor]:
        """What the objective compares of each branch, beta times a log-ratio or a log-probability,
        and by how much."""
        beta, reward = self._settings.scale, self._objective.reward
        chosen_P = beta * reward(pairs.chosen).detach()
        rejected_P = beta * reward(pairs.rejected).detach()
        return {
            "rewards_chosen": chosen_P,
            "rewards_rejected": rejected_P,
            "rewards_margin": chosen_P - rejected_P,
            "rewards_accuracy": _preferred(chosen_P - rejected_P),
        }

    def _kl_estimate(self, losses: ResponseLosses, full: Pairs) -> Tensor:
        """Mean over a pair's tokens of rho - 1 - log rho, where rho is reference over model
        probability.

        Its mean over the model's own samples is the divergence from the reference per token; these
        are given responses.
        """
        log_rho_BT = losses.nll_BT - losses.batch["reference_nll"]
        log_rho_R = losses.response_index.take(log_rho_BT).double()
        terms = self._of_responses(losses, torch.expm1(log_rho_R) - log_rho_R)
        tokens_P = (full.chosen.tokens_P + full.rejected.tokens_P).clamp_min(1)
        return (terms.chosen.nll_P + terms.rejected.nll_P) / tokens_P


def _preferred(difference_P: Tensor) -> Tensor:
    """1 where the first is preferred, 1/2 for a tie, else 0. What rounding leaves of equal losses
    is a tie."""
    return (torch.sign(torch.where(difference_P.abs() > ROUNDING, difference_P, 0.0)) + 1) / 2
