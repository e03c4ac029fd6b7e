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


def block_tokens(rows: int) -> int:
    """For how many tokens of the vocabulary at once it is differentiated on so many rows."""
    return max(1, LOGIT_BLOCK_ELEMENTS // max(rows, 1))


def _logits(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (R, V) float32, and their derivative by the head's output, where a cap makes it other
    than one."""
    logits_RV = F.linear(hidden_RH, weight_VH, bias_V).float()
    if softcap is None:
        return logits_RV, None
    bounded_RV = logits_RV.div_(softcap).tanh_()  # in place: it is large
    slope_RV = bounded_RV.square().neg_().add_(1)
    return bounded_RV.mul_(softcap), slope_RV


def _block_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log likelihoods (R,), their gradients with respect to the head's output (R, V), and
    the logarithms of the softmax's denominators (R,), all float32."""
    logits_RV, slope_RV = _logits(hidden_RH, weight_VH, bias_V, softcap)
    lse_R = torch.logsumexp(logits_RV, dim=-1)
    nll_R = lse_R - logits_RV.gather(1, targets_R[:, None])[:, 0]
    grad_RV = logits_RV.sub_(lse_R[:, None]).exp_()
    grad_RV.scatter_add_(1, targets_R[:, None], torch.full_like(nll_R, -1.0)[:, None])
    return nll_R, grad_RV if slope_RV is None else grad_RV.mul_(slope_RV), lse_R


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
        nll_R[block], grad_RV, _ = _block_loss(
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
        nll_R[block], grad_RV, _ = _block_loss(
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
    """Head and cross-entropy whose backward recomputes the logits, unless one block is all there
    is.

    The forward pass goes through blocks of rows, the backward pass through blocks of the
    vocabulary: each row of the weight's gradient is then one product, rounded once. Those of the
    hidden states, which are few numbers, are summed in float32.
    """

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
        lse_R = torch.empty_like(nll_R)
        only_block: Tensor | None = None
        for start in range(0, hidden_RH.shape[0], rows):
            block = slice(start, start + rows)
            nll_R[block], grad_RV, lse_R[block] = _block_loss(
                hidden_RH[block], weight_VH, bias_V, targets_R[block], softcap
            )
            if hidden_RH.shape[0] <= rows:
                only_block = grad_RV.to(hidden_RH.dtype)
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R, lse_R, only_block)
        ctx.softcap = softcap
        return nll_R

    @staticmethod
    def backward(
        ctx: Any, outgrad_R: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        hidden_RH, weight_VH, bias_V, targets_R, lse_R, only_block = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_RH, dtype=torch.float32)
        grad_weight = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        )
        tokens = weight_VH.shape[0]
        size = tokens if only_block is not None else block_tokens(len(hidden_RH))
        for start in range(0, tokens, size):
            block = slice(start, start + size)
            grad_RV = only_block
            if grad_RV is None:
                bias = None if bias_V is None else bias_V[block]
                grad_RV, slope_RV = _logits(hidden_RH, weight_VH[block], bias, ctx.softcap)
                grad_RV = grad_RV.sub_(lse_R[:, None]).exp_()
                inside_R = (targets_R >= start) & (targets_R < start + grad_RV.shape[1])
                target_R = (targets_R - start).clamp(0, grad_RV.shape[1] - 1)
                grad_RV.scatter_add_(1, target_R[:, None], -inside_R[:, None].float())
                if slope_RV is not None:
                    grad_RV.mul_(slope_RV)
            grad_RV = (grad_RV * outgrad_R[:, None]).to(hidden_RH.dtype)
            grad_hidden += grad_RV @ weight_VH[block]
            if grad_weight is not None:
                torch.mm(grad_RV.T, hidden_RH, out=grad_weight[block])
            if grad_bias is not None:
                grad_bias[block] = grad_RV.sum(0)
        return grad_hidden.to(hidden_RH.dtype), grad_weight, grad_bias, None, None


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
