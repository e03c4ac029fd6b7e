"""The slow, obvious definition of token values: float64, one sequence at a time, written from the
equations.

Every position gets its explicit outer product d_t h_t^T and every layer its explicit (T, T)
attention matrix. Nothing here is shared with the code it checks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

Sequences = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Scored:
    """The scored set S.

    linears: parameter name -> layer. values: those on the causal path -> their value rows (None:
    all). through: an adapter's A -> its B, by way of whose value rows the causal path reaches it.
    attention: layer -> module path. transposed: whether weights are stored (in, out).
    """

    linears: dict[str, int]
    values: dict[str, Sequence[int] | None]
    attention: dict[int, str]
    through: dict[str, str] = field(default_factory=dict)
    transposed: bool = False


@dataclass
class SequenceSignals:
    """One sequence's quantities: inputs (T, I) and output gradients (T, O) per linear, attention
    (T, T) per layer."""

    act: dict[str, Tensor]
    outgrad: dict[str, Tensor]
    attention: dict[int, Tensor]
    response: list[int]


def sequence_signals(
    model: PreTrainedModel, scored: Scored, ids: Tensor, labels: Tensor
) -> SequenceSignals:
    """`model` is a float64 copy with eager attention; `ids` and `labels` are (T,), without
    padding."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    attention: dict[int, Tensor] = {}
    handles = []
    for name in scored.linears:

        def remember(
            _module: object, args: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            inputs[name] = args[0][0].detach()
            outputs[name] = output
            output.retain_grad()

        handles.append(
            model.get_submodule(name.removesuffix(".weight")).register_forward_hook(remember)
        )
    for layer, path in scored.attention.items():

        def remember_attention(
            _module: object, _args: object, output: tuple[Tensor, ...], layer: int = layer
        ) -> None:
            attention[layer] = output[1][0].mean(0).detach()

        handles.append(model.get_submodule(path).register_forward_hook(remember_attention))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    response = [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    nll = sum((-log_probabilities[t, labels[t + 1]] for t in response), 0.0 * logits.sum())
    nll.backward()
    outgrads = {}
    for name, output in outputs.items():
        assert output.grad is not None
        outgrads[name] = output.grad[0]
    return SequenceSignals(inputs, outgrads, attention, response)


def oracle_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model the oracle works on."""
    twin = copy.deepcopy(model).double().eval()
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("eager")  # the grouped kernel has no float64
    return twin


def mean_gradients(
    model: PreTrainedModel, scored: Scored, validation: Sequences
) -> dict[str, Tensor]:
    """1/N_val sum_v d_v h_v^T per linear."""
    held_out = [sequence_signals(model, scored, ids, labels) for ids, labels in validation]
    count = sum(len(signals.response) for signals in held_out)
    mean = {}
    for name in scored.linears:
        outers = [
            torch.outer(signals.outgrad[name][v], signals.act[name][v])
            for signals in held_out
            for v in signals.response
        ]
        mean[name] = torch.stack(outers).sum(0) / count
    return mean


def half_differences(
    model: PreTrainedModel, scored: Scored, *sides: Sequences
) -> dict[str, Tensor]:
    """(G_a - G_b) / 2 per linear, where G_h = 2/N sum over the positions of half h. `sides` are the
    documents of a and of b."""
    halves = [[sequence_signals(model, scored, *row) for row in side] for side in sides]
    count = sum(len(signals.response) for half in halves for signals in half)
    differences = {}
    for name in scored.linears:
        outers = [
            [
                2 / count * torch.outer(signals.outgrad[name][v], signals.act[name][v])
                for signals in half
                for v in signals.response
            ]
            for half in halves
        ]
        first, second = (torch.stack(half).sum(0) for half in outers)
        differences[name] = (first - second) / 2
    return differences


def causal_outgrad(
    model: PreTrainedModel, scored: Scored, signals: SequenceSignals, name: str, k: int
) -> Tensor:
    """d_k of a linear on the causal path: of its value rows, or what they pass down to an adapter's
    A."""
    source = scored.through.get(name, name)
    rows = scored.values[source]
    outgrad = signals.outgrad[source][k]
    if rows is not None:
        kept = torch.zeros_like(outgrad)
        kept[list(rows)] = outgrad[list(rows)]
        outgrad = kept
    return outgrad if source == name else outgrad @ model.get_parameter(source).detach()


def token_values(  # noqa: PLR0913 - all that the equation reads
    model: PreTrainedModel,
    sequences: Sequences,
    validation: Sequences,
    *,
    scored: Scored,
    window: int,
    stability_weight: float,
    fisher: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    coefficients: Sequence[float] | None = None,
    contrast_weight: float = 0.0,
    contrast: Mapping[str, Tensor] | None = None,
    spread: Mapping[str, Tensor] | None = None,
    target: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """The six terms, the spread and the composite of every position of every sequence, each (T,)
    float64, 0 off the response.

    contrast: B per linear. spread: D per linear. target: G, by default of the summed losses of
    `validation`.
    """
    model = oracle_copy(model)
    target = mean_gradients(model, scored, validation) if target is None else target
    nothing = {name: torch.zeros_like(matrix) for name, matrix in target.items()}
    contrast, spread = contrast or nothing, spread or nothing
    drift = {name: torch.zeros_like(matrix) for name, matrix in target.items()}
    if fisher is not None and reference is not None:
        for name in scored.linears:
            moved = fisher[name].double() * (
                model.get_parameter(name).detach() - reference[name].double()
            )
            drift[name] = moved.T if scored.transposed else moved

    results = []
    for index, (ids, labels) in enumerate(sequences):
        signals = sequence_signals(model, scored, ids, labels)
        scale = 1.0 if coefficients is None else coefficients[index]
        length = len(ids)
        terms = {
            term: torch.zeros(length, dtype=torch.float64)
            for term in (
                "direct_target",
                "causal_target",
                "direct_contrast",
                "causal_contrast",
                "direct_proxy",
                "causal_proxy",
                "composite",
                "spread",
            )
        }
        for t in signals.response:
            for name, layer in scored.linears.items():
                act = signals.act[name]
                outer = scale * torch.outer(signals.outgrad[name][t], act[t])
                terms["direct_target"][t] += (outer * target[name]).sum()
                terms["direct_contrast"][t] += (outer * contrast[name]).sum()
                terms["direct_proxy"][t] += (outer * drift[name]).sum()
                terms["spread"][t] += (outer * spread[name]).sum()
                if (name in scored.values or name in scored.through) and layer in signals.attention:
                    for k in range(t + 1, min(t + window, length - 1) + 1):
                        outgrad = scale * causal_outgrad(model, scored, signals, name, k)
                        path = signals.attention[layer][k, t] * torch.outer(outgrad, act[t])
                        terms["causal_target"][t] += (path * target[name]).sum()
                        terms["causal_contrast"][t] += (path * contrast[name]).sum()
                        terms["causal_proxy"][t] += (path * drift[name]).sum()
                        terms["spread"][t] += (path * spread[name]).sum()
        terms["composite"] = (
            terms["direct_target"]
            + terms["causal_target"]
            - contrast_weight * (terms["direct_contrast"] + terms["causal_contrast"])
            + stability_weight * (terms["direct_proxy"] + terms["causal_proxy"])
        )
        results.append(terms)
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().max()
    return (
        float((actual - expected).abs().max() / scale) if scale > 0 else float(actual.abs().max())
    )
