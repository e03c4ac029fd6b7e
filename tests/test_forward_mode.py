"""What `exact` needs of a layer is known before weights are loaded, and a derivative that got lost
is an error, never a zero."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_5 import modeling_qwen3_5

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import decoder_of
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.passes.forward_mode import check_forward_mode
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.training.setup import build_run
from tests.oracle import relative_error
from tests.test_streamer import entry_of
from tests.tiny import CASES, by_architecture, collate, random_sequences, tiny_llama

CPU = torch.device("cpu")


class Doubled(torch.autograd.Function):
    """2 x, without a forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *outgrads: Any) -> Tensor:
        doubled: Tensor = 2 * outgrads[0]
        return doubled

    @classmethod
    def with_derivative(cls, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        """2 x, with `derivative` of the tangent for its forward derivative."""
        wrong: Any = type(
            "Wrong", (cls,), {"jvp": staticmethod(lambda _, tangent: derivative(tangent))}
        )
        output: Tensor = wrong.apply(x)
        return output


def saved_config(name: str, folder: Path) -> ModelConfig:
    CASES[name].build().config.save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder))


@pytest.mark.parametrize("name", by_architecture())
def test_every_architecture_passes_the_probe(name: str, tmp_path: Path) -> None:
    check_forward_mode(saved_config(name, tmp_path), CPU)


def test_the_probe_leaves_random_numbers_alone(tmp_path: Path) -> None:
    config = saved_config("llama", tmp_path)
    before = torch.get_rng_state()
    check_forward_mode(config, CPU)
    assert torch.equal(before, torch.get_rng_state())


def without_derivative(x: Tensor) -> Tensor:
    doubled: Any = Doubled
    output: Tensor = doubled.apply(x) / 2
    return output


def spoil(monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor]) -> None:
    """Puts a function behind the activation of every MLP of Llama."""
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: function(forward(self, x))
    )


def test_a_part_of_the_derivative_that_is_lost_is_found_before_loading(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual stream carries the rest of the tangent, so nothing else would show it."""
    spoil(monkeypatch, lambda y: Doubled.with_derivative(y, torch.zeros_like))
    monkeypatch.setattr(
        "alphatoken.training.setup._load", lambda *_: pytest.fail("weights were loaded")
    )
    run_values["valuation"] |= {"estimator": "exact", "window": 32}
    config = RunConfig.model_validate(run_values)
    with pytest.raises(UserError, match=r"the forward derivative of a LlamaDecoderLayer is off by"):
        build_run(config, SupervisedObjective())


def test_an_operation_without_forward_derivative_is_found_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, without_derivative)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer has no forward derivative"):
        check_forward_mode(saved_config("llama", tmp_path), CPU)


def test_a_kernel_that_reads_memory_by_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it makes would have no tangent."""

    def raw(x: Tensor) -> Tensor:
        assert x.data_ptr()
        return x

    spoil(monkeypatch, raw)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer has no forward derivative.*raw memory"):
        check_forward_mode(saved_config("llama", tmp_path), CPU)


def test_a_tangent_that_is_lost_whole_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once passed for a zero, and every value with it."""
    decoder = decoder_of(tiny_llama())
    batch = collate(random_sequences([(3, 4)], seed=1))
    entry = entry_of(decoder, batch)
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer,
        "forward",
        lambda self, hidden, *args, **kwargs: torch.ones_like(hidden),
    )
    streamer = LayerStreamer(decoder, 1, CPU, resident=True, forward_mode=True)
    streamer.refresh()
    hidden = entry.first_BTH
    tangents = torch.ones_like(hidden)[None]
    with pytest.raises(UserError, match="an operation in it loses the tangent"):
        streamer.jvp(streamer.module(1), hidden, tangents, entry.layer_inputs[0], {})


def test_fused_linear_attention_gives_way_to_that_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a package installed that has a fused function, `exact` still runs torch's, whose forward
    derivative is right, and only while it does."""
    torchs = modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__
    decoder = decoder_of(CASES["qwen3_5"].build())
    entry = entry_of(decoder, collate(random_sequences([(3, 4)], seed=1)))
    hidden = entry.first_BTH
    tangent = torch.randn_like(hidden)
    index = next(
        index for index, kind in enumerate(decoder.config.layer_types) if index and "linear" in kind
    )

    def derivative() -> Tensor:
        streamer = LayerStreamer(decoder, 1, CPU, resident=True, forward_mode=True)
        streamer.refresh()
        inputs = entry.layer_inputs[index - 1]
        return streamer.jvp(streamer.module(index), hidden, tangent[None], inputs, {})[1]

    expected = derivative()
    package = ModuleType("fused_standin")
    calls = []

    def fused(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(query.shape)
        output, state = torchs(query, *args, **kwargs)
        return without_derivative(output), state

    monkeypatch.setattr(fused, "__signature__", inspect.signature(torchs), raising=False)
    monkeypatch.setattr(package, "chunk_gated_delta_rule", fused, raising=False)
    monkeypatch.setitem(sys.modules, "fused_standin", package)
    wrap = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fused_standin")
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", wrap(torchs))
    assert relative_error(derivative(), expected) == 0
    assert not calls
    decoder.hidden_states({"input_ids": torch.ones(1, 5, dtype=torch.int64)})
    assert calls  # it is back
