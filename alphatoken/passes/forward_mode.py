"""Whether a model's layers have forward derivatives on this machine, before weights are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from alphatoken.config.sections import ModelConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import decoder_of
from alphatoken.models.loading import model_without_weights
from alphatoken.models.scored import Segment
from alphatoken.passes.capture import EntryCapture, LayerInput
from alphatoken.passes.streamer import NO_INPUT, LayerStreamer

PROBED_TOKENS = 12
PROBED_VOCABULARY = 64
PROBES = 4
LARGEST_ERROR = 1e-2  # rounding in float32 stays below 1e-4


def check_forward_mode(config: ModelConfig, device: torch.device) -> None:
    """Refuses a model whose layers have no forward derivative on this device, or a wrong one, which
    an operation that loses tangents gives without an error.

    One layer of each kind of the model's `config.json` is built in float32 with random weights, and
    <u, J v> from forward mode compared with <J^T u, v> from reverse mode for random u and v. Takes
    the memory of a few layers. Raises UserError.
    """
    kinds = _first_of_each_kind(config)
    model = _shallow_model(config, depth=max(kinds) + 1).to(device)
    decoder = decoder_of(model.requires_grad_(requires_grad=False).eval())
    streamer = LayerStreamer(decoder, 0, device, resident=False, forward_mode=True)
    ids = torch.arange(PROBED_TOKENS, device=device)[None]
    with torch.no_grad(), EntryCapture(decoder, 0, keep="every") as capture:
        decoder.hidden_states({"input_ids": ids})
    entry = capture.entry
    places: list[tuple[Segment, Tensor, LayerInput]] = [
        (index, entry.into(index), entry.layer_inputs[index]) for index in kinds
    ]
    for segment, hidden_BTH, inputs in [*places, ("norm", entry.out, NO_INPUT)]:
        with streamer.segment(segment) as module:
            error = _adjoint_error(streamer, module, hidden_BTH, inputs)
            if not error <= LARGEST_ERROR:
                raise UserError(
                    f"valuation.estimator=exact is not possible with {type(model).__name__} here: "
                    f"the forward derivative of a {type(module).__name__} is off by {error:.0%}, "
                    "so an operation in it (a fused kernel?) loses a part of it without saying so; "
                    "use valuation.estimator=ghost"
                )


def _first_of_each_kind(config: ModelConfig) -> list[int]:
    """The first layer of each kind that the model has, by what it is made of."""
    decoder = decoder_of(model_without_weights(config, "eager"))
    kinds: dict[tuple[type[nn.Module], ...], int] = {}
    for index, layer in enumerate(decoder.layers):
        kinds.setdefault(tuple(type(part) for part in layer.modules()), index)
    return sorted(kinds.values())


def _shallow_model(config: ModelConfig, depth: int) -> Any:
    """The first layers of the model with random weights and few tokens."""
    settings: PretrainedConfig = AutoConfig.from_pretrained(config.name_or_path)
    text = settings.get_text_config()
    layers = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    text.vocab_size = PROBED_VOCABULARY
    text.pad_token_id = None
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, attn_implementation="eager"
        )


def _adjoint_error(
    streamer: LayerStreamer, module: nn.Module, hidden_BTH: Tensor, inputs: LayerInput
) -> float:
    """How far <u, J v> is from <J^T u, v> over random u, relative to the length of J v."""
    generator = torch.Generator(hidden_BTH.device).manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        return noise * tensor.square().mean().sqrt()

    weights = {path: weight.detach() for path, weight in module.named_parameters()}
    tangents = {path: random_like(weight) for path, weight in weights.items()}
    tangent_BTH = random_like(hidden_BTH)
    # Twice the same direction: operations have to work for several at once, too.
    output_BTH, (derivative_BTH, _) = streamer.jvp(
        module,
        hidden_BTH,
        torch.stack([tangent_BTH] * 2),
        inputs,
        {path: torch.stack([tangent] * 2) for path, tangent in tangents.items()},
    )
    squares = torch.zeros((), device=hidden_BTH.device, dtype=torch.float64)
    for _ in range(PROBES):
        outgrad_BTH = random_like(torch.ones_like(output_BTH))
        gradient_BTH, gradients = streamer.vjp(module, hidden_BTH, inputs, outgrad_BTH, weights)
        backward = (gradient_BTH * tangent_BTH).sum(dtype=torch.float64)
        for path, gradient in gradients.items():
            backward += (gradient * tangents[path]).sum(dtype=torch.float64)
        forward = (outgrad_BTH * derivative_BTH).sum(dtype=torch.float64)
        squares += (forward - backward).square() / PROBES
    return float(squares.sqrt() / derivative_BTH.norm())
