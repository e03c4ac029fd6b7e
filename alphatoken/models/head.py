"""The head of a causal LM with its cross-entropy, in blocks of rows: losses, their gradients and
forward derivatives, the entropy of its predictions, and tokens drawn from them.

Shape legend: B sequences, T positions, R selected loss positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The head works on as many rows at once as keep one float32 block of logits within 256 MiB.
LOGIT_BLOCK_ELEMENTS = 2**26
ENTROPY_TOKENS = 20
"""Of how many of the likeliest tokens `head_entropy` is the entropy."""


def block_rows(vocabulary: int) -> int:
    """How many rows the head works on at once."""
    return max(1, LOGIT_BLOCK_ELEMENTS // vocabulary)


def _block_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods (R,) and their gradients with respect to the head's output (R, V),
    both float32."""
    logits_RV = F.linear(hidden_RH, weight_VH, bias_V).float()
    slope_RV: Tensor | None = None
    if softcap is not None:
        bounded_RV = torch.tanh(logits_RV / softcap)
        logits_RV, slope_RV = softcap * bounded_RV, 1 - bounded_RV.square()
    lse_R = torch.logsumexp(logits_RV, dim=-1)
    nll_R = lse_R - logits_RV.gather(1, targets_R[:, None])[:, 0]
    grad_RV = logits_RV.sub_(lse_R[:, None]).exp_()
    grad_RV.scatter_add_(1, targets_R[:, None], torch.full_like(nll_R, -1.0)[:, None])
    return nll_R, grad_RV if slope_RV is None else grad_RV.mul_(slope_RV)


@torch.no_grad()
def head_loss(
    hidden_RH: Tensor, head: nn.Linear, targets_R: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of each with respect to its own hidden state; no graph, one block of
    logits at a time.

    hidden_RH: (R, H) after the final norm; targets_R: (R,) int64; `softcap`: logits are c
    tanh(logits / c). Returns nll (R,) float32 and gradients (R, H) in the dtype of `hidden_RH`.
    """
    nll_R = torch.empty(hidden_RH.shape[0], device=hidden_RH.device)
    grad_RH = torch.empty_like(hidden_RH)
    rows = block_rows(head.weight.shape[0])
    for start in range(0, hidden_RH.shape[0], rows):
        block = slice(start, start + rows)
        nll_R[block], grad_RV = _block_loss(
            hidden_RH[block], head.weight, head.bias, targets_R[block], softcap
        )
        grad_RH[block] = grad_RV.to(hidden_RH.dtype) @ head.weight
    return nll_R, grad_RH


@torch.no_grad()
def head_outgrads(
    hidden_RH: Tensor, head: nn.Linear, targets_R: Tensor, softcap: float | None = None
) -> Tensor:
    """Gradient of each row's loss with respect to the head's output before any cap, (R, V)
    float32."""
    return _block_loss(hidden_RH, head.weight, head.bias, targets_R, softcap)[1]


@torch.no_grad()
def head_jvp(
    hidden_RH: Tensor,
    tangents_NRH: Tensor,
    head: nn.Linear,
    weight_tangents: Mapping[str, Tensor],
    targets_R: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, (R,), and their derivatives, (N, R), when the states after the norm move along each
    of `tangents_NRH` and the head's weights along each of `weight_tangents` (by name N whole ones,
    stacked; absent ones do not move). Float32, one block of logits of a direction at a time.
    """
    nll_R = torch.empty(hidden_RH.shape[0], device=hidden_RH.device)
    derivative_NR = nll_R.new_empty(len(tangents_NRH), *nll_R.shape)
    rows = block_rows(head.weight.shape[0])
    for start in range(0, hidden_RH.shape[0], rows):
        block = slice(start, start + rows)
        nll_R[block], grad_RV = _block_loss(
            hidden_RH[block], head.weight, head.bias, targets_R[block], softcap
        )
        for number, tangent_RH in enumerate(tangents_NRH):
            tangent_RV = F.linear(tangent_RH[block], head.weight)
            if "weight" in weight_tangents:
                tangent_RV += F.linear(hidden_RH[block], weight_tangents["weight"][number])
            if "bias" in weight_tangents:
                tangent_RV += weight_tangents["bias"][number]
            derivative_NR[number, block] = torch.linalg.vecdot(grad_RV, tangent_RV.float())
    return nll_R, derivative_NR


@torch.no_grad()
def head_entropy(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Entropy of each row's prediction over its 20 likeliest tokens, whose probabilities are scaled
    to sum to one; in nats, (R,) float32, no graph, one block of logits at a time.

    `softcap`: logits are c tanh(logits / c). With a smaller vocabulary it is over all of it.
    """
    entropy_R = torch.empty(hidden_RH.shape[0], device=hidden_RH.device)
    count, rows = min(ENTROPY_TOKENS, weight_VH.shape[0]), block_rows(weight_VH.shape[0])
    for start in range(0, hidden_RH.shape[0], rows):
        block = slice(start, start + rows)
        logits_RV = F.linear(hidden_RH[block], weight_VH, bias_V).float()
        # The cap keeps the order, so it need only reach the likeliest.
        logits_RK = logits_RV.topk(count, dim=-1).values
        if softcap is not None:
            logits_RK = softcap * torch.tanh(logits_RK / softcap)
        log_p_RK = logits_RK.log_softmax(dim=-1)
        entropy_R[block] = -(log_p_RK.exp() * log_p_RK).sum(-1)
    return entropy_R


def draw_tokens(logits_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Samples a token per row from softmax(logits), temperature 1: the first whose cumulative
    probability is above u.

    uniform_R: (R,) in [0, 1). Returns (R,) int64. The same numbers draw the same tokens, in
    whatever batch.
    """
    largest_R1 = logits_RV.amax(dim=-1, keepdim=True).double()
    cumulative_RV = (
        logits_RV.double().sub_(largest_R1).exp_().cumsum_(dim=-1)
    )  # in place: it is large
    threshold_R1 = (uniform_R.double() * cumulative_RV[:, -1])[:, None]
    token_R = torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0]
    return token_R.clamp_max(logits_RV.shape[1] - 1)


@torch.no_grad()
def head_samples(
    hidden_RH: Tensor, head: nn.Linear, uniform_R: Tensor, softcap: float | None = None
) -> Tensor:
    """A token drawn from the model's own prediction at each of the given states after the final
    norm; (R,) int64."""
    token_R = torch.empty(hidden_RH.shape[0], dtype=torch.int64, device=hidden_RH.device)
    rows = max(1, block_rows(head.weight.shape[0]) // 16)  # probabilities are float64
    for start in range(0, hidden_RH.shape[0], rows):
        block = slice(start, start + rows)
        logits_RV = head(hidden_RH[block]).float()
        if softcap is not None:
            logits_RV = softcap * torch.tanh(logits_RV / softcap)
        token_R[block] = draw_tokens(logits_RV, uniform_R[block])
    return token_R


class BlockedNLL(torch.autograd.Function):
    """Head and cross-entropy whose backward recomputes the logits block by block, unless one block
    is all there is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_R: Tensor,
        softcap: float | None,
    ) -> Tensor:
        rows = block_rows(weight_VH.shape[0])
        nll_R = torch.empty(hidden_RH.shape[0], device=hidden_RH.device)
        only_block: Tensor | None = None
        for start in range(0, hidden_RH.shape[0], rows):
            block = slice(start, start + rows)
            nll_R[block], grad_RV = _block_loss(
                hidden_RH[block], weight_VH, bias_V, targets_R[block], softcap
            )
            if hidden_RH.shape[0] <= rows:
                only_block = grad_RV.to(hidden_RH.dtype)
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R, only_block)
        ctx.softcap = softcap
        return nll_R

    @staticmethod
    def backward(
        ctx: Any, outgrad_R: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        hidden_RH, weight_VH, bias_V, targets_R, only_block = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RH)
        grad_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        )
        rows = block_rows(weight_VH.shape[0])
        for start in range(0, hidden_RH.shape[0], rows):
            block = slice(start, start + rows)
            grad_RV = only_block
            if grad_RV is None:
                _, grad_RV = _block_loss(
                    hidden_RH[block], weight_VH, bias_V, targets_R[block], ctx.softcap
                )
            grad_RV = (grad_RV * outgrad_R[block, None]).to(hidden_RH.dtype)
            grad_hidden[block] = grad_RV @ weight_VH
            if grad_weight is not None:
                grad_weight.addmm_(grad_RV.T, hidden_RH[block])
            if grad_bias is not None:
                grad_bias += grad_RV.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def head_nll(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    softcap: float | None,
) -> Tensor:
    """Negative log likelihood of each row, (R,) float32, differentiable; memory is bounded by one
    block of logits."""
    nll_R: Tensor = BlockedNLL.apply(hidden_RH, weight_VH, bias_V, targets_R, softcap)  # type: ignore[no-untyped-call]
    return nll_R


class HeadLoss(nn.Module):
    """The head and its cross-entropy as one module, sharing the head's parameters.

    ZeRO-3 gathers a module's weights around its forward call: blocks inside one call cost one
    gather, and a rank with no rows makes the same call as the others. `softcap`: logits are c
    tanh(logits / c).
    """

    def __init__(self, head: nn.Linear, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self._softcap = softcap

    def forward(self, hidden_RH: Tensor, targets_R: Tensor | None = None) -> Tensor:
        """Negative log likelihood of each row, (R,) float32, as `head_nll` computes it; without
        targets the entropy of each row's prediction, as `head_entropy` does."""
        if targets_R is None:
            return head_entropy(hidden_RH, self.weight, self.bias, self._softcap)
        return head_nll(hidden_RH, self.weight, self.bias, targets_R, self._softcap)
