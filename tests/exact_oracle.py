"""The slow, obvious definition of exact values: float64, one gradient per token by autograd, over
whole parameters.

Nothing here is shared with the code it checks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p) if each is None else each
        for p, each in zip(parameters, found, strict=True)
    ]


def exact_values(
    model: PreTrainedModel,
    sequences: Sequences,
    validation: Sequences,
    names: Collection[str],
    *,
    fisher: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    scale: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """`direct_target` = <grad l_t, G> and `direct_proxy` = <grad l_t, V> per position of every
    sequence, (T,) float64.

    `scale` multiplies both directions, elementwise.
    """
    model = oracle_copy(model)
    parameters = [model.get_parameter(name) for name in names]
    held_out = [token_losses(model, ids, labels) for ids, labels in validation]
    total = sum(loss for losses in held_out for loss in losses.values())
    assert isinstance(total, Tensor)
    target = [each / sum(map(len, held_out)) for each in gradients(total, parameters)]
    drift = [torch.zeros_like(parameter) for parameter in parameters]
    if fisher is not None and reference is not None:
        drift = [
            fisher[name].double() * (parameter.detach() - reference[name].double())
            for name, parameter in zip(names, parameters, strict=True)
        ]
    if scale is not None:
        scales = [scale[name].double() for name in names]
        target, drift = (
            [a * b for a, b in zip(each, scales, strict=True)] for each in (target, drift)
        )
    results = []
    for ids, labels in sequences:
        values = {
            term: torch.zeros(len(ids), dtype=torch.float64)
            for term in ("direct_target", "direct_proxy")
        }
        for t, loss in token_losses(model, ids, labels).items():
            own = gradients(loss, parameters)
            values["direct_target"][t] = sum(
                (a * b).sum() for a, b in zip(own, target, strict=True)
            )
            values["direct_proxy"][t] = sum((a * b).sum() for a, b in zip(own, drift, strict=True))
        results.append(values)
    return results
