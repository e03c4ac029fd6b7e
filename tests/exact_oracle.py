"""The slow, obvious definition of exact values: float64, one gradient per token by autograd, over
whole parameters.

Nothing here is shared with the code it checks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.oracle import Sequences, oracle_copy


def token_losses(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Loss of each response position of one sequence, with its graph."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return {
        t: -log_probabilities[t, labels[t + 1]]
        for t in range(len(ids) - 1)
        if labels[t + 1] != -100
    }


HeldOutLoss = Callable[[list[Tensor]], Tensor]
"""From the token losses of every held-out sequence, (R,) each, with their graph."""


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p) if each is None else each
        for p, each in zip(parameters, found, strict=True)
    ]


def halves(
    model: PreTrainedModel, rows: Sequences, parameters: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The mean gradient of the rows' losses, and half the difference between those of even and odd
    rows, each 2/N times its sum; equal rows have one number."""
    losses = [token_losses(model, ids, labels) for ids, labels in rows]
    count = sum(map(len, losses))
    contents = [(*ids.tolist(), *labels.tolist()) for ids, labels in rows]
    distinct = list(dict.fromkeys(contents))
    sums = []
    for parity in (0, 1):
        half = [
            own
            for own, content in zip(losses, contents, strict=True)
            if distinct.index(content) % 2 == parity
        ]
        total = sum((loss for row in half for loss in row.values()), torch.zeros(()).double())
        sums.append(
            gradients(total, parameters)
            if total.requires_grad
            else [torch.zeros_like(each) for each in parameters]
        )
    mean = [(a + b) / count for a, b in zip(*sums, strict=True)]
    return mean, [(2 * a / count - 2 * b / count) / 2 for a, b in zip(*sums, strict=True)]


def exact_values(  # noqa: PLR0913 - all that the definition reads
    model: PreTrainedModel,
    sequences: Sequences,
    validation: Sequences,
    names: Collection[str],
    *,
    fisher: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    scale: Mapping[str, Tensor] | None = None,
    contrast: Sequences = (),
    contrast_weight: float = 0.0,
    held_out_loss: HeldOutLoss | None = None,
) -> list[dict[str, Tensor]]:
    """`direct_target` = <grad l_t, G>, `direct_contrast` = <grad l_t, B>, `direct_proxy` = <grad
    l_t, V> and `spread` = <grad l_t, D> per position of every sequence, (T,) float64.

    `scale` multiplies all directions, elementwise. B is the mean gradient of the rows `contrast`; D
    is half the difference of G - c B between rows of even and odd number. G is of `held_out_loss`
    of the held-out sequences' token losses, by default their sum.
    """
    model = oracle_copy(model)
    parameters = [model.get_parameter(name) for name in names]
    target, spread = halves(model, validation, parameters)
    if held_out_loss is not None:
        held_out = [token_losses(model, ids, labels) for ids, labels in validation]
        total = held_out_loss([torch.stack(list(losses.values())) for losses in held_out])
        target = [each / sum(map(len, held_out)) for each in gradients(total, parameters)]
    other = [torch.zeros_like(each) for each in target]
    if contrast:
        other, difference = halves(model, contrast, parameters)
        spread = [a - contrast_weight * b for a, b in zip(spread, difference, strict=True)]
    drift = [torch.zeros_like(parameter) for parameter in parameters]
    if fisher is not None and reference is not None:
        drift = [
            fisher[name].double() * (parameter.detach() - reference[name].double())
            for name, parameter in zip(names, parameters, strict=True)
        ]
    if scale is not None:
        scales = [scale[name].double() for name in names]
        target, other, drift, spread = (
            [a * b for a, b in zip(each, scales, strict=True)]
            for each in (target, other, drift, spread)
        )
    directions = {
        "direct_target": target,
        "direct_contrast": other,
        "direct_proxy": drift,
        "spread": spread,
    }
    results = []
    for ids, labels in sequences:
        values = {term: torch.zeros(len(ids), dtype=torch.float64) for term in directions}
        for t, loss in token_losses(model, ids, labels).items():
            own = gradients(loss, parameters)
            for term, direction in directions.items():
                values[term][t] = sum((a * b).sum() for a, b in zip(own, direction, strict=True))
        results.append(values)
    return results
