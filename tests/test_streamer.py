"""One layer at a time: forward, vector-Jacobian and Jacobian-vector products against the model's
own autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.planner.counting import FlopCounter
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.test_valuation import LENGTHS
from tests.tiny import CASES, by_architecture, collate, random_sequences

CPU = torch.device("cpu")
FIRST = 1


def entry_of(decoder: Decoder, batch: dict[str, Tensor]) -> Entry:
    with torch.no_grad(), EntryCapture(decoder, FIRST, keep="first") as capture:
        decoder.hidden_states({"input_ids": batch["input_ids"]})
    return capture.entry


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "name", by_architecture(name for name in CASES if name != "qwen3_5")
)  # computes in float32 inside
def test_products_match_autograd(name: str, resident: bool) -> None:
    model = CASES[name].build().double()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    if CASES[name].eager_only:
        model.set_attn_implementation("eager")
    decoder = decoder_of(model)
    batch = collate(random_sequences(LENGTHS, seed=1))
    streamer = LayerStreamer(decoder, FIRST, CPU, resident=resident, forward_mode=True)
    streamer.refresh()
    entry = entry_of(decoder, batch)
    generator = torch.Generator().manual_seed(3)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    hidden = entry.first_BTH
    for index, inputs in zip(streamer.indices, entry.layer_inputs, strict=True):
        own = decoder.layers[index]
        weights = dict(own.named_parameters())
        leaf = hidden.clone().requires_grad_()
        output = own(leaf, *inputs.args, **inputs.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        outgrad, tangent = random_like(output), random_like(hidden)
        tangents = {name: random_like(weight) for name, weight in weights.items()}
        expected = torch.autograd.grad(output, [leaf, *weights.values()], outgrad)

        with streamer.segment(index) as module, torch.no_grad():
            assert relative_error(streamer.forward(module, hidden, inputs), output) <= 1e-12
            entry_gradient, gradients = streamer.vjp(module, hidden, inputs, outgrad, list(weights))
            other = random_like(tangent)
            primal, derivatives = streamer.jvp(
                module,
                hidden,
                torch.stack([tangent, other, 2 * tangent - other]),
                inputs,
                {path: torch.stack([each, -each, 3 * each]) for path, each in tangents.items()},
            )
            derivative = derivatives[0]
            # J(2 a - b) = 2 J a - J b
            combined = 2 * derivative - derivatives[1]
            assert relative_error(derivatives[2], combined) <= 1e-6
        assert relative_error(entry_gradient, expected[0]) <= 1e-12
        for weight, reference in zip(weights, expected[1:], strict=True):
            error = relative_error(gradients[weight], reference)
            assert error <= 1e-12, f"{weight} is off by {error:.1e}"
        assert relative_error(primal, output) <= 1e-6  # softmax in float32
        # <outgrad, J tangent> = <J^T outgrad, tangent>
        products = [
            gradient * direction
            for gradient, direction in zip(expected, [tangent, *tangents.values()], strict=True)
        ]
        forward_mode, reverse_mode = (
            float((outgrad * derivative).sum()),
            sum(float(each.sum()) for each in products),
        )
        magnitude = sum(float(each.abs().sum()) for each in products)  # the terms may cancel
        assert abs(forward_mode - reverse_mode) <= 1e-6 * magnitude
        hidden = output.detach()
        if not resident:
            assert all(parameter.is_meta for parameter in streamer.module(index).parameters())


def test_what_does_not_move_is_computed_once_for_all_directions() -> None:
    """A matrix product whose both sides move counts 1 + 2n times for n directions, not 3n."""
    decoder = decoder_of(CASES["llama"].build())
    streamer = LayerStreamer(decoder, FIRST, CPU, resident=True, forward_mode=True)
    streamer.refresh()
    entry = entry_of(decoder, collate(random_sequences(LENGTHS, seed=1)))
    index = streamer.indices[0]
    weights = dict(decoder.layers[index].named_parameters())

    def flops(directions: int) -> int:
        with streamer.segment(index) as module, torch.no_grad(), FlopCounter() as counter:
            streamer.jvp(
                module,
                entry.first_BTH,
                torch.randn(directions, *entry.first_BTH.shape),
                entry.layer_inputs[0],
                {path: torch.randn(directions, *each.shape) for path, each in weights.items()},
            )
        return int(counter.total)

    assert flops(2) == pytest.approx(5 / 3 * flops(1), rel=0.02)
    assert flops(4) == pytest.approx(9 / 3 * flops(1), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_products_under_zero_equal_one_process(
    world_size: int, run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    """Every rank brings rows of its own."""
    run_values["valuation"]["fisher"] = str(tiny_fisher)
    configs = {
        f"stage {stage}": {
            **run_values,
            "train": {**run_values["train"], "output_dir": str(tmp_path / str(stage))},
            "deepspeed": {"config": {"zero_optimization": {"stage": stage}}},
        }
        for stage in (2, 3)
    }
    results = run_ranks("layer_products", world_size, tmp_path / "ranks", configs=configs)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        run_values["model"]["name_or_path"]
    )
    decoder = decoder_of(model)
    streamer = LayerStreamer(decoder, FIRST, CPU, resident=True, forward_mode=True)
    streamer.refresh()
    for name in configs:
        for result in results:
            for index, product in result[name].items():
                inputs = product["inputs"]
                module = streamer.module(index)
                gradient, weights = streamer.vjp(
                    module, product["hidden"], inputs, product["outgrad"], list(product["weights"])
                )
                assert relative_error(product["gradient"], gradient) <= 1e-5
                output, derivative = streamer.jvp(
                    module, product["hidden"], product["outgrad"][None], inputs, product["tangents"]
                )
                assert relative_error(product["output"], output) <= 1e-5
                assert relative_error(product["derivative"], derivative) <= 1e-5
                for path, whole in product["weights"].items():
                    assert relative_error(whole, weights[path]) <= 1e-5, path
