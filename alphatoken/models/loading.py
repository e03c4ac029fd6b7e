"""Model and tokenizer loading, and what is refused before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import LoraConfig, ModelConfig
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.models.compatibility import (
    architecture_of_config,
    best_attention,
    check_attention,
    check_valuation,
)
from alphatoken.models.decoder import Decoder, decoder_of

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def check_before_loading(config: RunConfig, *, here: bool = True) -> None:
    """What the model's `config.json` can tell before any weight is read. Raises UserError.

    `here`: whether this machine is to run it.
    """
    try:
        model_config = AutoConfig.from_pretrained(config.model.name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={config.model.name_or_path} cannot be loaded: {error}"
        ) from None
    architecture = architecture_of_config(model_config)
    check_attention(model_config, config.model.attn_implementation, config.model.dtype, here=here)
    if config.data.packing and architecture.recurrent:
        raise UserError(
            f"data.packing=true is not possible with {model_config.model_type}: its "
            "linear-attention layers carry a state from one document into the next"
        )
    if config.valuation.enabled:
        check_valuation(model_config, config.valuation.layers)


def attention_of(model: ModelConfig) -> str:
    """The attention kernel that a model is loaded with here: the configured one, or what `auto`
    stands for."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    return best_attention(AutoConfig.from_pretrained(model.name_or_path), model.dtype)


def usable_attention(model: ModelConfig) -> str:
    """The configured attention kernel where this model can run it, else the best that it can."""
    model_config = AutoConfig.from_pretrained(model.name_or_path)
    try:
        check_attention(model_config, model.attn_implementation, model.dtype)
    except UserError:
        return best_attention(model_config, model.dtype)
    return model.attn_implementation


def settle_model(config: ConfigT) -> ConfigT:
    """`name_attention`, where nothing speaks against the model. What is recorded of a run therefore
    says what it ran with.

    Every rank must call it. Raises UserError as `check_before_loading` does, and where `auto`
    stands for different kernels on the ranks, whose micro-batches might then differ.
    """
    check_before_loading(config)
    named = name_attention(config)
    problem = different_kernels(collectives.gather_objects(named.model.attn_implementation))
    if problem is not None:
        raise UserError(problem)
    return named


def name_attention(config: ConfigT) -> ConfigT:
    """The configuration with its attention kernel by name: in place of `auto` what that stands for
    on this machine."""
    model = config.model.model_copy(update={"attn_implementation": attention_of(config.model)})
    return config.model_copy(update={"model": model})


def different_kernels(by_rank: Sequence[str]) -> str | None:
    """What to say where ranks would run different attention kernels."""
    ranks = {name: by_rank.index(name) for name in sorted(set(by_rank))}
    if len(ranks) == 1:
        return None
    found = ", ".join(f"{name} on rank {first}" for name, first in ranks.items())
    return (
        f"model.attn_implementation=auto is {found}: install the same packages on every node, or "
        "name a kernel that all of them have"
    )


def load_model(config: ModelConfig, deepspeed_values: dict[str, Any], seed: int) -> PreTrainedModel:
    """The pretrained model, with fresh adapters if LoRA is configured (`seed` makes them alike on
    every rank).

    Under ZeRO-3 each rank keeps its slices only, from the moment a weight is read.
    """
    from transformers.integrations import HfDeepSpeedConfig

    stage = deepspeed_values.get("zero_optimization", {}).get("stage", 0)
    # transformers shards at load for as long as this object lives.
    sharding = HfDeepSpeedConfig(deepspeed_values) if stage == 3 else None
    model = AutoModelForCausalLM.from_pretrained(
        config.name_or_path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    )
    del sharding
    assert isinstance(model, PreTrainedModel)
    if config.lora is not None:
        _add_adapters(model, config.lora, seed)
    if stage == 3:
        _register_external_weights(decoder_of(model))
    return model


def model_without_weights(config: ModelConfig, attention: str) -> PreTrainedModel:
    """Builds the configured model on the meta device, from its `config.json` alone, with the named
    attention implementation."""
    model_config = AutoConfig.from_pretrained(config.name_or_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=getattr(torch, config.dtype), attn_implementation=attention
        )
    assert isinstance(model, PreTrainedModel)
    if config.lora is not None:
        _add_adapters(model, config.lora, seed=0)
    return model


def _register_external_weights(decoder: Decoder) -> None:
    """DeepSpeed finds these by itself only inside the engine's own forward pass, not when we score
    or evaluate."""
    for layer in decoder.layers:
        parts = dict(layer.named_modules())
        for part, weight in decoder.architecture.external_weights:
            if part in parts:
                zero3.register_external(parts[part], weight)


def _add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    try:
        import peft
    except ImportError:
        raise UserError(
            "model.lora needs the peft package: pip install 'alphatoken[lora]'"
        ) from None
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=_adapter_targets(model, config),
        task_type="CAUSAL_LM",
    )
    # Adapters in the weights' own dtype: the engine keeps float32 masters of them.
    dtype = model.dtype
    try:
        model.add_adapter(settings)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={config.target_modules}: {error}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _adapter_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """peft's own "all-linear" does not know `transformers` models with adapters built in."""
    if config.target_modules != "all-linear":
        return config.target_modules
    architecture = decoder_of(model).architecture
    return sorted({path.rsplit(".", 1)[-1] for path in architecture.linears})
