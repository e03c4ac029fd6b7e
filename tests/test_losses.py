"""The blocked head against plain cross-entropy, in values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alphatoken.batch import loss_positions, make_batch
from alphatoken.models import head as head_module
from alphatoken.models.head import HeadLoss, head_jvp, head_loss, head_nll, head_outgrads
from alphatoken.objectives.base import KeptLosses
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.planner.counting import PeakBytes
from tests.oracle import relative_error


def test_position_t_predicts_token_t_plus_one() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]])
    response, targets = loss_positions(labels)
    assert response.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert targets[response].tolist() == [5, 6, 8]


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_blocked_head_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
    bias: bool,
    rows_per_block: int,
    rows: int,
    softcap: float | None,
) -> None:
    vocabulary = 13
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", rows_per_block * vocabulary)
    torch.manual_seed(0)
    head = nn.Linear(6, vocabulary, bias=bias)
    hidden = torch.randn(rows, 6, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    weights = torch.rand(rows)

    def cross_entropy(reduction: str) -> Tensor:
        logits = head(hidden)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return nn.functional.cross_entropy(logits, targets, reduction=reduction)

    nll = HeadLoss(head, softcap)(hidden, targets)
    (nll * weights).sum().backward()
    gradients = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    expected = cross_entropy("none")
    (expected * weights).sum().backward()
    references = [hidden.grad, *(parameter.grad for parameter in head.parameters())]

    assert torch.allclose(nll, expected, atol=1e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient is not None, "a rank without rows must take part in the reduction"
        assert reference is not None
        assert torch.allclose(gradient, reference, atol=1e-6)

    plain_nll, plain_gradient = head_loss(hidden.detach(), head, targets, softcap)
    assert torch.allclose(plain_nll, expected, atol=1e-6)
    if rows:
        (own,) = torch.autograd.grad(cross_entropy("sum"), hidden)
        assert relative_error(plain_gradient, own) <= 1e-5


def test_in_bfloat16_blocks_of_the_head_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is rounded once per block strays from the true one; one that is rounded at
    its end does not."""
    vocabulary, rows = 64, 512
    head = nn.Linear(16, vocabulary, dtype=torch.bfloat16)
    hidden = torch.randn(rows, 16, dtype=torch.bfloat16)
    targets, weights = torch.randint(0, vocabulary, (rows,)), torch.rand(rows)

    def gradients(nll: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            each.detach().to(dtype).requires_grad_() for each in (hidden, head.weight, head.bias)
        ]
        return list(torch.autograd.grad((nll(*leaves) * weights).sum(), leaves))

    def blocked(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        return head_nll(hidden_RH, weight_VH, bias_V, targets, None)

    def whole(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        logits_RV = nn.functional.linear(hidden_RH, weight_VH, bias_V)
        return nn.functional.cross_entropy(logits_RV, targets, reduction="none")

    truth = gradients(whole, torch.float64)
    one_block = gradients(blocked, torch.bfloat16)
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", rows * vocabulary // 64)
    many_blocks = gradients(blocked, torch.bfloat16)
    for name, one, many, true in zip(
        ("hidden states", "weight", "bias"), one_block, many_blocks, truth, strict=True
    ):
        assert relative_error(many, true) <= 1.5 * relative_error(one, true), name


@pytest.mark.parametrize(("softcap", "blocks"), [(None, 2), (0.8, 3)])
def test_memory_of_the_head_is_bounded_by_blocks_of_logits(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, blocks: int
) -> None:
    """Of sixteen that all logits would be, twice: as much again inside the log-sum-exp or for the
    product with the loss's gradient, and once more for a cap's derivative."""
    vocabulary, rows = 4096, 128
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", rows // 16 * vocabulary)
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    most = 1.05 * blocks * 4 * head_module.LOGIT_BLOCK_ELEMENTS
    with PeakBytes([hidden, weight, targets]) as forward:
        nll = head_nll(hidden, weight, None, targets, softcap)
    with PeakBytes([hidden, weight, targets]) as backward:
        nll.sum().backward()
    assert forward.total <= most
    assert backward.total - weight.nbytes <= most, "beside the gradient itself"


def test_the_supervised_objective_is_a_sum_over_kept_tokens() -> None:
    objective = SupervisedObjective()
    batch = make_batch({"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)})
    nll_BT, weight_BT = torch.tensor([[1.0, 2.5, 7.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    losses = KeptLosses(
        batch=batch,
        nll_BT=nll_BT,
        weight_BT=weight_BT,
        kept_index_R=torch.tensor([0, 1]),
        kept_nll_R=nll_BT[weight_BT > 0],
    )
    assert objective.total(losses) == 6.0
    assert objective.denominator(counted_tokens=4, rows=9) == 4
    assert objective.coefficients(losses).equal(torch.ones(1, 3))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("moving", [("weight", "bias"), ("weight",), ()])
@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("rows", [0, 7])
def test_the_heads_derivatives_equal_autograds(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    rows_per_block: int,
    moving: tuple[str, ...],
    softcap: float | None,
) -> None:
    vocabulary = 13
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", rows_per_block * vocabulary)
    head = nn.Linear(6, vocabulary).requires_grad_(requires_grad=False)
    hidden, targets = torch.randn(rows, 6), torch.randint(0, vocabulary, (rows,))
    tangents = torch.randn(2, rows, 6)
    directions = {name: torch.randn(2, *head.get_parameter(name).shape) for name in moving}

    def nll(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        logits = hidden_RH.double() @ weight_VH.double().T + bias_V.double()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    inputs = (hidden, head.weight.detach(), head.bias.detach())
    actual_nll, actual = head_jvp(hidden, tangents, head, directions, targets, softcap)
    assert actual.shape == (2, rows)
    for number, tangent in enumerate(tangents):
        weight, bias = (
            directions[name][number] if name in directions else torch.zeros_like(parameter)
            for name, parameter in head.named_parameters()
        )
        moved = (tangent, weight, bias)
        expected, derivative = torch.func.jvp(nll, inputs, moved)  # type: ignore[misc]
        if rows:
            assert relative_error(actual_nll, expected) <= 1e-5
            assert relative_error(actual[number], derivative) <= 1e-5

    bias = head.bias.clone().requires_grad_()
    loss = nll(hidden, head.weight, bias)
    by_row = [torch.autograd.grad(each, bias, retain_graph=True)[0] for each in loss]
    found = head_outgrads(hidden, head, targets, softcap)
    assert found.shape == (rows, vocabulary)
    if rows:
        assert relative_error(found, torch.stack(by_row)) <= 1e-5


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabulary", [13, 50])
@pytest.mark.parametrize("rows", [0, 7])
def test_the_entropy_is_that_of_the_twenty_likeliest_tokens(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, bias: bool, softcap: float | None
) -> None:
    """Also where the vocabulary has fewer, and over several blocks of rows."""
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", 3 * vocabulary)
    torch.manual_seed(0)
    head = nn.Linear(6, vocabulary, bias=bias)
    hidden = torch.randn(rows, 6)
    expected = []
    for logits in head(hidden).double().tolist():
        capped = [
            each if softcap is None else softcap * math.tanh(each / softcap) for each in logits
        ]
        odds = sorted((math.exp(each) for each in capped), reverse=True)[:20]
        shares = [each / sum(odds) for each in odds]
        expected.append(-sum(share * math.log(share) for share in shares))
    actual = HeadLoss(head, softcap)(hidden)
    assert actual.shape == (rows,)
    assert not actual.requires_grad
    assert torch.allclose(actual.double(), torch.tensor(expected).double(), atol=1e-5)
