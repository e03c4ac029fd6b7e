"""Objectives on pairs: against values by hand, definitions written from log-probabilities, and
autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphatoken.batch import RowIndex
from alphatoken.config.objectives import OBJECTIVE_TRAITS, OPTIONAL_KEYS
from alphatoken.config.preference import PreferenceConfig
from alphatoken.objectives.base import KeptLosses
from alphatoken.objectives.pair_losses import (
    PAIR_OBJECTIVES,
    Branch,
    Pairs,
    alpha_dpo,
    cpo,
    dpo,
    hinge,
    ipo,
    orpo,
    register_objective,
    simpo,
)
from alphatoken.objectives.preference import PreferenceObjective

OBJECTIVES: dict[str, dict[str, Any]] = {
    "alpha_dpo": {},
    "alpha_dpo, mean": {"normalisation": "mean_kept", "beta": 0.3},
    "dpo": {"beta": 0.2},
    "dpo, smoothed": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {"beta": 0.05},
    "simpo": {"margin": 0.7},
    "orpo": {"beta": 0.4},
    "cpo": {"nll_weight": 0.3},
    "dpo, with nll": {"nll_weight": 0.5},
    "dpo, length decayed": {"length_decay": 0.3},
    "ipo, length decayed": {"length_decay": 0.0},
    "alpha_dpo, length decayed": {"length_decay": 0.6},
}


def section(name: str) -> dict[str, Any]:
    """The configuration section `preference` of a case."""
    return {"objective": name.split(",")[0], **OBJECTIVES[name]}


def objective_of(name: str) -> PreferenceObjective:
    return PreferenceObjective(PreferenceConfig.model_validate(section(name)))


def branch(nll: float, reference: float, tokens: float) -> Branch:
    return Branch(
        *(torch.tensor([number], dtype=torch.float64) for number in (nll, reference, tokens))
    )


# Log-ratios +2 and -1, losses per token 2 and 3, so p = e^-2 and e^-3.
PAIR = Pairs(branch(8.0, 10.0, 4.0), branch(6.0, 5.0, 2.0))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: dpo(PAIR, 0.5), math.log(1 + math.exp(-1.5))),
        (
            lambda: dpo(PAIR, 0.5, 0.25),
            0.75 * math.log(1 + math.exp(-1.5)) + 0.25 * math.log(1 + math.exp(1.5)),
        ),
        (lambda: ipo(PAIR, 0.25), (3 - 2) ** 2),
        (lambda: hinge(PAIR, 0.2), 0.4),
        (lambda: hinge(PAIR, 1.0), 0.0),
        (lambda: simpo(PAIR, 2.0, 0.5), math.log(1 + math.exp(-(2.0 - 0.5)))),
        (
            lambda: orpo(PAIR, 0.1),
            0.1
            * math.log(
                1 + (math.exp(-3) / (1 - math.exp(-3))) / (math.exp(-2) / (1 - math.exp(-2)))
            ),
        ),
        (lambda: cpo(PAIR, 0.5), math.log(1 + math.exp(0.5 * 2))),
        (lambda: alpha_dpo(PAIR, torch.tensor(0.3)), 0.3 * (8 - 6)),
        (lambda: alpha_dpo(PAIR, torch.tensor(0.3), "mean_kept"), 0.3 * (2 - 3)),
    ],
)
def test_values_computed_by_hand(loss: Callable[[], Tensor], expected: float) -> None:
    assert float(loss()) == pytest.approx(expected, rel=1e-6)


def length_decayed(name: str, chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """The model's numbers of both responses, of which those beyond the shorter one's length count
    less: log of prod_{t <= l} p_t prod_{t > l} p_t^alpha, term by term."""
    decay, shorter = OBJECTIVES[name].get("length_decay", 1.0), min(len(chosen), len(rejected))
    return [torch.cat([each[:shorter], decay * each[shorter:]]) for each in (chosen, rejected)]


def standard(
    name: str, chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor]
) -> Tensor:
    """The published definition for one pair, from the log-probabilities of all its tokens, (T,)
    each."""
    options = OBJECTIVES[name]
    beta: float = options.get("beta", 2.0 if name == "simpo" else 0.1)
    smoothing: float = options.get("label_smoothing", 0.0)
    margin: float = options.get("margin", 0.5)
    nll_weight: float = options.get("nll_weight", 0.0)
    sigmoid = torch.nn.functional.sigmoid
    chosen, rejected = length_decayed(name, chosen, rejected)
    ratio = (chosen.sum() - reference[0].sum()) - (rejected.sum() - reference[1].sum())
    log_p = chosen.mean(), rejected.mean()
    match name.split(",")[0]:
        case "alpha_dpo":
            weight = (beta * sigmoid(-beta * ratio)).detach()
            if "normalisation" in options:
                return weight * (log_p[1] - log_p[0])
            return weight * (rejected.sum() - chosen.sum())
        case "dpo":
            loss = (
                -(1 - smoothing) * sigmoid(beta * ratio).log()
                - smoothing * sigmoid(-beta * ratio).log()
            )
            return loss - nll_weight * chosen.mean()
        case "ipo":
            return (ratio - 1 / (2 * beta)) ** 2
        case "hinge":
            return torch.clamp(1 - beta * ratio, min=0)
        case "simpo":
            return -sigmoid(beta * log_p[0] - beta * log_p[1] - margin).log()
        case "orpo":
            odds = [probability.exp() / (1 - probability.exp()) for probability in log_p]
            return -chosen.mean() - beta * sigmoid((odds[0] / odds[1]).log()).log()
        case "cpo":
            return (
                -sigmoid(beta * (chosen.sum() - rejected.sum())).log() - nll_weight * chosen.mean()
            )
    raise AssertionError(name)


# Losses, reference losses and weights of one response's tokens, (T,) each.
Side = tuple[Tensor, Tensor, Tensor]


def sums(side: Side) -> Side:
    """Weighed sums of losses and of reference losses, and the sum of weights."""
    nll, reference, weight = side
    return (weight * nll).sum(), (weight * reference).sum(), weight.sum()


def masked_loss(name: str, chosen: Side, rejected: Side) -> Tensor:
    """The formula of one pair on masked sums, term by term."""
    options = OBJECTIVES[name]
    beta: float = options.get("beta", 2.0 if name == "simpo" else 0.1)
    smoothing: float = options.get("label_smoothing", 0.0)
    margin: float = options.get("margin", 0.5)
    nll_weight: float = options.get("nll_weight", 0.0)
    decayed = length_decayed(name, chosen[0], rejected[0])
    chosen, rejected = (decayed[0], *chosen[1:]), (decayed[1], *rejected[1:])
    (nll, reference, tokens), (rejected_nll, rejected_reference, rejected_tokens) = (
        sums(chosen),
        sums(rejected),
    )
    mean, rejected_mean = nll / tokens, rejected_nll / rejected_tokens
    s = beta * ((reference - nll) - (rejected_reference - rejected_nll))
    match name.split(",")[0]:
        case "alpha_dpo":
            s_of_all = beta * ((chosen[1] - chosen[0]).sum() - (rejected[1] - rejected[0]).sum())
            omega = (beta / (1 + torch.exp(s_of_all))).detach()
            return omega * (
                mean - rejected_mean if "normalisation" in options else nll - rejected_nll
            )
        case "dpo":
            loss = (1 - smoothing) * torch.log1p(torch.exp(-s)) + smoothing * torch.log1p(
                torch.exp(s)
            )
            return loss + nll_weight * mean
        case "ipo":
            return (s / beta - 0.5 / beta) ** 2
        case "hinge":
            return torch.maximum(torch.zeros(()), 1 - s)
        case "simpo":
            return torch.log1p(torch.exp(margin - beta * (rejected_mean - mean)))
        case "orpo":
            logit, rejected_logit = (
                -each - torch.log1p(-torch.exp(-each)) for each in (mean, rejected_mean)
            )
            return beta * torch.log1p(torch.exp(rejected_logit - logit)) + mean
        case "cpo":
            return torch.log1p(torch.exp(beta * (nll - rejected_nll))) + nll_weight * mean
    raise AssertionError(name)


class Tokens:
    """Random losses of some pairs in a batch whose documents lie in an order of their own, with
    padding."""

    def __init__(self, lengths: Sequence[tuple[int, int]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        documents = list(enumerate(length for pair in lengths for length in pair))
        longest = max((length for _, length in documents), default=0)
        shape = (max(len(documents), 1), longest + 3)
        self.nll_BT = torch.zeros(shape)
        self.batch: Any = {
            "document_ids": torch.full(shape, -1),
            "rows": torch.arange(len(lengths)).repeat_interleave(2),
            "reference_nll": torch.zeros(shape),
        }
        self.response_BT = torch.zeros(shape, dtype=torch.bool)
        self.batch["response"] = self.response_BT
        for row, (document, length) in enumerate(reversed(documents)):
            self.batch["document_ids"][row, : length + 2] = document
            self.response_BT[row, 1 : length + 1] = True
            self.nll_BT[row, 1 : length + 1] = 3 * torch.rand(length, generator=generator)
            self.batch["reference_nll"][row, 1 : length + 1] = 3 * torch.rand(
                length, generator=generator
            )

        self.batch["response_index"] = RowIndex.of_mask(self.response_BT)

    def of_document(self, values_BT: Tensor, document: int) -> Tensor:
        return values_BT[self.response_BT & (self.batch["document_ids"] == document)]

    def kept(self, weight_BT: Tensor, nll_BT: Tensor | None = None) -> KeptLosses:
        """The losses as an objective sees them; the kept ones are taken from `nll_BT`, if given."""
        kept_nll_R = (self.nll_BT if nll_BT is None else nll_BT)[weight_BT > 0]
        return KeptLosses(
            batch=self.batch,
            nll_BT=self.nll_BT,
            weight_BT=weight_BT,
            kept_index_R=(weight_BT > 0).flatten().nonzero()[:, 0],
            kept_nll_R=kept_nll_R,
        )

    def all_kept(self) -> KeptLosses:
        """The losses with all response tokens kept."""
        return self.kept(self.response_BT.float())

    def total(self, objective: PreferenceObjective, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, and its gradient with respect to every token's loss."""
        leaf_BT = self.nll_BT.clone().requires_grad_()
        total = objective.total(self.kept(weight_BT, leaf_BT))
        (gradient_BT,) = torch.autograd.grad(total, leaf_BT)
        return total.detach(), gradient_BT


LENGTHS = [(4, 7), (1, 3), (6, 6)]


def test_every_objective_has_a_loss_traits_and_a_definition_here() -> None:
    assert PAIR_OBJECTIVES.keys() == OBJECTIVE_TRAITS.keys()
    assert PAIR_OBJECTIVES.keys() == {name.split(",")[0] for name in OBJECTIVES}
    assert set(OPTIONAL_KEYS) == set().union(*(each.reads for each in OBJECTIVE_TRAITS.values()))


def test_an_objective_that_reads_an_unknown_key_or_takes_a_name_is_refused() -> None:
    dpo_again = PAIR_OBJECTIVES["dpo"]
    with pytest.raises(ValueError, match=r"objective 'mine' reads \['gamma'\]; keys that only"):
        register_objective("mine", dpo_again, needs_reference=True, reads=["gamma", "margin"])
    with pytest.raises(ValueError, match="there is a preference objective 'dpo' already"):
        register_objective("dpo", dpo_again, needs_reference=True)
    assert "mine" not in OBJECTIVE_TRAITS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_all_tokens_kept_it_is_the_standard_definition(name: str) -> None:
    tokens, objective = Tokens(LENGTHS), objective_of(name)
    total, gradient_BT = tokens.total(objective, tokens.response_BT.float())

    log_p = [
        -tokens.of_document(tokens.nll_BT, document).double().requires_grad_()
        for document in range(6)
    ]
    reference = [
        -tokens.of_document(tokens.batch["reference_nll"], document).double()
        for document in range(6)
    ]
    losses = [
        standard(name, log_p[i], log_p[i + 1], (reference[i], reference[i + 1])) for i in (0, 2, 4)
    ]
    summed = torch.stack(losses).sum()
    expected = torch.autograd.grad(summed, log_p)

    assert float(total) == pytest.approx(summed.item(), rel=1e-5)
    coefficient_BT = objective.coefficients(tokens.all_kept())
    for document, derivative in enumerate(expected):
        ours = tokens.of_document(gradient_BT, document)
        assert torch.allclose(ours.double(), -derivative, rtol=1e-4, atol=1e-7), (
            f"document {document}"
        )
        # d objective / d (sum of losses): the tokens of a sequence all have it, whatever their
        # own loss.
        assert torch.allclose(
            tokens.of_document(coefficient_BT, document), ours, rtol=1e-4, atol=1e-7
        )
    assert not coefficient_BT[~tokens.response_BT].any()


def test_the_length_decay_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ValueError, match=r"length_decay=0.5: only preference.objective=alpha_dpo"):
        PreferenceConfig(objective="simpo", length_decay=0.5)
    with pytest.raises(ValueError, match=r"length_decay=0.5 and preference.nll_weight=1.0"):
        PreferenceConfig(objective="dpo", length_decay=0.5, nll_weight=1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_have_no_gradient_and_kept_ones_have_their_formulas(name: str) -> None:
    tokens, objective = Tokens(LENGTHS, seed=1), objective_of(name)
    weight_BT = (
        torch.rand(tokens.nll_BT.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    ) & tokens.response_BT
    weight_BT = weight_BT.float() * 0.5  # as soft weights
    _, gradient_BT = tokens.total(objective, weight_BT)
    assert not gradient_BT[weight_BT == 0].any()

    def of_pair(pair: int, nll_BT: Tensor) -> tuple[Side, Side]:
        columns_BT = (nll_BT, tokens.batch["reference_nll"].double(), weight_BT.double())
        sides = (2 * pair, 2 * pair + 1)
        chosen, rejected = (
            [tokens.of_document(column_BT, side) for column_BT in columns_BT] for side in sides
        )
        return (chosen[0], chosen[1], chosen[2]), (rejected[0], rejected[1], rejected[2])

    leaf_BT = tokens.nll_BT.double().requires_grad_()
    losses = [masked_loss(name, *of_pair(pair, leaf_BT)) for pair in range(len(LENGTHS))]
    (expected_BT,) = torch.autograd.grad(torch.stack(losses).sum(), leaf_BT)
    assert torch.allclose(gradient_BT.double(), expected_BT, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_branch_without_kept_tokens_is_finite(name: str) -> None:
    tokens, objective = Tokens(LENGTHS), objective_of(name)
    weight_BT = tokens.response_BT.float()
    weight_BT[tokens.batch["document_ids"] == 0] = 0
    weight_BT[tokens.batch["document_ids"] == 3] = 0
    total, gradient_BT = tokens.total(objective, weight_BT)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient_BT).all()
    metrics = objective.metrics(tokens.kept(weight_BT))
    assert all(bool(torch.isfinite(each).all()) for each in metrics.values())


def test_a_certain_response_has_finite_odds() -> None:
    for nll in (0.0, 1e-30, 1e-9):
        pair = Pairs(
            Branch(
                torch.tensor([nll], dtype=torch.float64, requires_grad=True),
                torch.zeros(1),
                torch.ones(1),
            ),
            branch(6.0, 0.0, 2.0),
        )
        loss = orpo(pair, 0.1)
        loss.sum().backward()
        assert torch.isfinite(loss)
        assert pair.chosen.nll_P.grad is not None
        assert torch.isfinite(pair.chosen.nll_P.grad)


def test_a_micro_batch_without_pairs_takes_part() -> None:
    tokens = Tokens([])
    for name in OBJECTIVES:
        objective = objective_of(name)
        total, _ = tokens.total(objective, tokens.response_BT.float())
        assert total == 0
        metrics = objective.metrics(tokens.all_kept())
        full = Tokens(LENGTHS)
        others = objective.metrics(full.all_kept())
        assert metrics.keys() == others.keys(), "all ranks must report the same"
        assert all(len(each) == 0 for each in metrics.values())


@given(st.floats(-30, 30), st.floats(0.01, 3))
def test_dpos_gradient_is_the_papers_weight(ratio: float, beta: float) -> None:
    """At all-ones masks the gradient of DPO's loss is that of omega (sum l+ - sum l-)."""
    nll = torch.tensor([40.0], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(Branch(nll, torch.tensor([40.0 + ratio]), torch.ones(1)), branch(3.0, 3.0, 1.0))
    (derivative,) = torch.autograd.grad(dpo(pairs, beta).sum(), nll)
    assert float(derivative) == pytest.approx(beta / (1 + math.exp(beta * ratio)), rel=1e-5)


def test_metrics_are_what_they_say() -> None:
    tokens, objective = (
        Tokens([(2, 3)]),
        PreferenceObjective(PreferenceConfig(objective="dpo", beta=0.5)),
    )
    weight_BT = tokens.response_BT.float()
    weight_BT[(tokens.batch["document_ids"] == 0) & (weight_BT.cumsum(1) == 2)] = (
        0  # the second token of chosen
    )
    metrics = objective.metrics(tokens.kept(weight_BT))
    nll = [tokens.of_document(tokens.nll_BT, document).double() for document in (0, 1)]
    reference = [
        tokens.of_document(tokens.batch["reference_nll"], document).double() for document in (0, 1)
    ]
    rewards = [0.5 * float((r - own).sum()) for r, own in zip(reference, nll, strict=True)]
    log_ratio = torch.cat(nll) - torch.cat(reference)
    expected = {
        "rewards_chosen": rewards[0],
        "rewards_rejected": rewards[1],
        "rewards_margin": rewards[0] - rewards[1],
        "rewards_accuracy": float(rewards[0] > rewards[1]),
        "rewards_chosen_masked": 0.5 * float(reference[0][0] - nll[0][0]),
        "omega": 0.5 / (1 + math.exp(rewards[0] - rewards[1])),
        "kl_estimate": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "length_chosen": 2,
        "length_rejected": 3,
        "kept_share_chosen": 0.5,
        "kept_share_rejected": 1.0,
    }
    for key, value in expected.items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-5), key


def test_evaluation_of_alpha_dpo_is_dpos_loss_beside_a_length_baseline() -> None:
    tokens = Tokens([(4, 7), (5, 3), (6, 6)])
    found = objective_of("alpha_dpo").evaluation(tokens.all_kept())
    plain = PreferenceObjective(PreferenceConfig(objective="dpo"))
    expected = plain.evaluation(tokens.all_kept())
    assert torch.equal(found["loss"], expected["loss"])
    assert found["length_accuracy"].tolist() == [0.0, 1.0, 0.5]


def test_rounding_is_no_preference() -> None:
    tokens, objective = Tokens([(4, 7), (3, 3)]), PreferenceObjective(PreferenceConfig())
    noise = 1e-7 * torch.randn(tokens.nll_BT.shape)
    tokens.batch["reference_nll"] = torch.where(tokens.response_BT, tokens.nll_BT + noise, 0.0)
    assert objective.evaluation(tokens.all_kept())["rewards_accuracy"].tolist() == [
        0.5,
        0.5,
    ]


def test_a_token_the_model_has_learned_by_heart_leaves_the_divergence_finite() -> None:
    tokens, objective = Tokens([(2, 2)]), PreferenceObjective(PreferenceConfig())
    tokens.nll_BT[tokens.response_BT] = 120.0
    metrics = objective.metrics(tokens.all_kept())
    assert torch.isfinite(metrics["kl_estimate"]).all()
