"""The slow, obvious definition of the diagonal Fisher: float64, one sequence at a time, every
completion enumerated.

Nothing here is shared with the code it checks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.oracle import Scored, oracle_copy, sequence_signals


class Squares(NamedTuple):
    """Of one linear, in the shape of its weight: sum_t (d_t h_t^T)^2 and (sum_t d_t h_t^T)^2."""

    token: Tensor
    sequence: Tensor


def squares(
    model: PreTrainedModel, names: Collection[str], ids: Tensor, labels: Tensor
) -> dict[str, Squares]:
    """`model` is an `oracle_copy`; `ids` and `labels` are (T,), without padding. Labels need not be
    the ids."""
    signals = sequence_signals(model, Scored(dict.fromkeys(names, 0), {}, {}), ids, labels)
    found = {}
    for name in names:
        pairs = zip(signals.outgrad[name], signals.act[name], strict=True)
        outers = torch.stack([torch.outer(outgrad, act) for outgrad, act in pairs])
        pair = Squares(outers.square().sum(0), outers.sum(0).square())
        transposed = _is_transposed(model, name)
        found[name] = Squares(pair.token.T, pair.sequence.T) if transposed else pair
    return found


def position_gradients(
    model: PreTrainedModel,
    names: Collection[str],
    ids: Tensor,
    labels: Tensor,
    head_first: str = "$^",
) -> dict[str, list[Tensor]]:
    """The gradient of the summed loss by any parameter, position by position of the modules that
    own it.

    For every position one pass over the sequence, in which the owners use the parameter there, and
    a constant of the same value elsewhere. `model` is an `oracle_copy`. Outputs are (1, T, ...), or
    (1, heads, T, F) of modules whose path matches `head_first`.
    """
    owners: dict[int, tuple[nn.Module, int]] = {}
    parameters = [model.get_parameter(name) for name in names]
    wanted = {id(parameter) for parameter in parameters}
    for path, module in model.named_modules():
        if any(id(own) in wanted for own in module.parameters(recurse=False)):
            owners[id(module)] = module, 2 if re.search(head_first, path) else 1
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for position in range(len(ids)):
        with ExitStack() as stack:
            for module, axis in owners.values():
                stack.enter_context(_parameters_at(module, position, axis, len(ids)))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nll = nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            found[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return found


@contextmanager
def _parameters_at(module: nn.Module, position: int, axis: int, length: int) -> Iterator[None]:
    """Lets gradients reach a module's parameters through one position of its output, along `axis`,
    only."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = original(*args, **kwargs)
        module.requires_grad_(requires_grad=False)
        constant: Tensor = original(*args, **kwargs)
        module.requires_grad_(requires_grad=True)
        assert output.shape[axis] == length
        here = torch.arange(length) == position
        return torch.where(
            here.view([-1 if each == axis else 1 for each in range(output.dim())]), output, constant
        )

    module.forward = forward
    try:
        yield
    finally:
        module.forward = original


def _is_transposed(model: PreTrainedModel, name: str) -> bool:
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


@torch.no_grad()
def completions(
    model: PreTrainedModel, prompt: Tensor, max_new_tokens: int, stop_tokens: Collection[int]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every completion y that the model can give, and p(y | prompt). A completion ends with a stop
    token or is full."""
    probabilities = torch.softmax(
        model(input_ids=prompt[None], use_cache=False).logits[0, -1], dim=-1
    )
    for token, probability in enumerate(probabilities.tolist()):
        if token in stop_tokens or max_new_tokens == 1:
            yield (token,), probability
            continue
        longer = torch.cat([prompt, torch.tensor([token])])
        for rest, conditional in completions(model, longer, max_new_tokens - 1, stop_tokens):
            yield (token, *rest), probability * conditional


@dataclass
class ExactFisher:
    """By linear: the expectation over prompts and completions, and the variance of one draw.

    The variance is that of the completion given its prompt, averaged over prompts: the mean of n
    draws that are spread evenly over the prompts has `variance / n`.
    """

    mean: dict[str, Squares]
    variance: dict[str, Squares]


def exact_fisher(
    model: PreTrainedModel,
    names: Collection[str],
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    stop_tokens: Collection[int],
) -> ExactFisher:
    """Mean over prompts x of sum_y p(y | x) squares(x, y), over all completions y."""
    model = oracle_copy(model)
    moments = [_moments(model, names, prompt, max_new_tokens, stop_tokens) for prompt in prompts]
    mean, variance = {}, {}
    for name in names:
        first, second = (
            torch.stack([moment[name][power] for moment in moments]) for power in (0, 1)
        )
        mean[name] = Squares(*first.mean(0))
        variance[name] = Squares(*(second - first.square()).mean(0).clamp_min(0))
    return ExactFisher(mean, variance)


def _moments(
    model: PreTrainedModel,
    names: Collection[str],
    prompt: Tensor,
    max_new_tokens: int,
    stop_tokens: Collection[int],
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """E and E of the square of one prompt's squares; (2, O, I) each, token and sequence stacked."""
    first = {
        name: torch.zeros(2, *model.get_parameter(name).shape, dtype=torch.float64)
        for name in names
    }
    second = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
    total = 0.0
    for completion, probability in completions(model, prompt, max_new_tokens, stop_tokens):
        answer = torch.tensor(completion)
        ids, labels = (
            torch.cat([prompt, answer]),
            torch.cat([torch.full_like(prompt, -100), answer]),
        )
        for name, pair in squares(model, names, ids, labels).items():
            first[name] += probability * torch.stack(pair)
            second[name] += probability * torch.stack(pair).square()
        total += probability
    assert math.isclose(total, 1.0, rel_tol=1e-6), f"the completions' probabilities sum to {total}"
    return {name: (first[name], second[name]) for name in names}
