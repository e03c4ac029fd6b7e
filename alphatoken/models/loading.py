"""Model and tokenizer loading, and what is refused before weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import LoraConfig, ModelConfig
from alphatoken.data.pretrained import read_settings
from alphatoken.data.tokenizer import load_tokenizer, tokens_of
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.models.compatibility import (
    architecture_of_config,
    best_attention,
    check_attention,
    check_divided_rows,
    check_valuation,
)
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.util.wording import plural

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def check_before_loading(config: RunConfig, *, here: bool = True) -> None:
    """What the model's `config.json` can tell before any weight is read. Raises UserError.

    `here`: whether this machine is to run it.
    """
    model_config = read_settings(config.model.name_or_path)
    architecture = architecture_of_config(model_config)
    check_attention(model_config, config.model.attn_implementation, config.model.dtype, here=here)
    if config.data.packing and architecture.recurrent:
        raise UserError(
            f"data.packing=true is not possible with {model_config.model_type}: its "
            "linear-attention layers carry a state from one document into the next"
        )
    if config.train.sequence_parallel > 1:
        check_divided_rows(model_config, config.train.sequence_parallel)
    if config.valuation.enabled:
        check_valuation(model_config, config.valuation.layers)


def attention_of(model: ModelConfig) -> str:
    """The attention kernel that a model is loaded with here: the configured one, or what `auto`
    stands for."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    return best_attention(read_settings(model.name_or_path), model.dtype)


def usable_attention(model: ModelConfig) -> str:
    """The configured attention kernel where this model can run it, else the best that it can."""
    model_config = read_settings(model.name_or_path)
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


def fetch_weights(name_or_path: str) -> None:
    """Has the weights of a model of the hub on this machine, where they are in safetensors;
    `transformers` looks for others. Nothing to do for a folder.

    Raises nothing: what cannot be had `transformers` says, where it reads it.
    """
    if Path(name_or_path).is_dir():
        return
    # The base of the hub's own error is what a connection raises that breaks.
    with suppress(OSError, HfHubHTTPError.__bases__[0], ValueError):
        snapshot_download(
            name_or_path, allow_patterns=["model*.safetensors", "model.safetensors.index.json"]
        )


def load_model(
    config: ModelConfig,
    deepspeed_values: dict[str, Any],
    seed: int,
    tokens: int | None = None,
    *,
    key: str = "model.name_or_path",
) -> PreTrainedModel:
    """The pretrained model, with fresh adapters if LoRA is configured (`seed` makes them alike on
    every rank), and with `model.resize_embeddings` an embedding for each of `tokens` tokens.

    Under ZeRO-3 each rank keeps its slices only, from the moment a weight is read. Every rank must
    call it. Raises UserError for weights that cannot be read, and on every rank for those that are
    not all there, or of other shapes; `key` is the setting that names the model.
    """
    from transformers.integrations import HfDeepSpeedConfig

    # A machine that has to download longer than the others must not keep them waiting for weights.
    collectives.agree(lambda: fetch_weights(config.name_or_path))

    stage = deepspeed_values.get("zero_optimization", {}).get("stage", 0)
    # transformers shards at load for as long as this object lives.
    sharding = HfDeepSpeedConfig(deepspeed_values) if stage == 3 else None
    model = _pretrained(config, f"{key}={config.name_or_path}")
    del sharding
    if config.resize_embeddings and tokens is not None:
        grow_embeddings(model, tokens)
    if config.lora is not None:
        _add_adapters(model, config.lora, seed)
    if stage == 3:
        _register_external_weights(decoder_of(model))
    return model


def _pretrained(config: ModelConfig, where: str) -> PreTrainedModel:
    """The model with its weights. Every rank must call it. Raises UserError where they cannot be
    read, and on every rank where some that the model has are not among them, which `transformers`
    fills with random numbers, or have other shapes."""
    model, found, misfit = None, {}, None
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            config.name_or_path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            ignore_mismatched_sizes=True,  # `check` tells them by name
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be loaded: {error}") from error
    except RuntimeError as error:
        # Under ZeRO-3 rank 0 alone compares shapes, and says so when all ranks have loaded.
        misfit = re.search(r"size mismatch for ([\w.]+)", str(error))
        if misfit is None:
            raise

    def check() -> None:
        if misfit is not None:
            raise UserError(
                f"{where}: the shape of {misfit[1]} in its files is not that of its config.json. "
                "Name a folder whose files belong together"
            )
        check_whole(type(model), found, where)

    collectives.agree(check)
    assert isinstance(model, PreTrainedModel)
    return model


def check_whole(kind: type[Any], found: Mapping[str, Any], where: str) -> None:
    """Raises UserError where the files of a model of this class lack weights, which `transformers`
    fills with random numbers; `found` is what it tells with `output_loading_info`."""
    absent = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if not absent:
        return
    unexpected = sorted(found["unexpected_keys"])
    named = f"; what the model has not: {_first_of(unexpected)}" if unexpected else ""
    raise UserError(
        f"{where}: its files lack {plural(len(absent), 'weight')} of {kind.__name__}, which would "
        f"be random: {_first_of(absent)}{named}. Name a folder with all weights, by the names that "
        "transformers gives them"
    )


def _first_of(names: Sequence[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Gives each of `tokens` tokens a row of the embeddings and of the head, where there are fewer:
    new ones are the mean of the others. What is tied stays tied, what is sharded is sharded.

    Before there is an engine. Every rank must call it. (`resize_token_embeddings` of transformers
    draws new rows at random, and leaves them whole on every rank under ZeRO-3.)
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    assert isinstance(head, nn.Linear)
    before = zero3.full_shape(embeddings.weight)[0]
    if tokens <= before:
        return
    grown: dict[int, nn.Parameter] = {}
    for module in (embeddings, head):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in grown:
                grown[id(parameter)] = zero3.with_more_rows(parameter, tokens)
            setattr(module, name, grown[id(parameter)])
    embeddings.num_embeddings = head.out_features = tokens
    for owner in (model.config.get_text_config(), *model.modules()):
        if getattr(owner, "vocab_size", None) == before:
            owner.vocab_size = tokens


def model_without_weights(config: ModelConfig, attention: str) -> PreTrainedModel:
    """Builds the configured model on the meta device, from its `config.json` alone, with the named
    attention implementation."""
    model_config = read_settings(config.name_or_path)
    if config.resize_embeddings:
        text = model_config.get_text_config()
        text.vocab_size = max(text.vocab_size, tokens_of(load_tokenizer(config)))
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
    towers = _targeted_towers(model, config)
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=_adapter_targets(model, config),
        exclude_modules="|".join(rf"{re.escape(each)}(\..*)?" for each in towers) or None,
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


def adapters_note(model: PreTrainedModel, config: ModelConfig) -> str | None:
    """Which parts of the model get no adapters although linears of theirs have the names of those
    that do; None without one."""
    towers = [] if config.lora is None else _targeted_towers(model, config.lora)
    if not towers:
        return None
    return f"adapters are in the decoder alone: no text runs through {', '.join(towers)}"


def experts_note(model: PreTrainedModel) -> str | None:
    """What a mixture of experts costs; None of another model. All experts of a layer are weights of
    one module, which ZeRO-3 gathers whole, so ranks whose tokens go to different experts gather
    alike (no leaf modules are needed)."""
    experts = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".experts." in name and len(zero3.full_shape(parameter)) == 3
    }
    if not experts:
        return None
    count = max(zero3.full_shape(each)[0] for each in experts.values())
    theirs, all_weights = (
        sum(zero3.full_shape(each).numel() for each in group)
        for group in (experts.values(), model.parameters())
    )
    return (
        f"{count} experts in a layer, {theirs / all_weights:.0%} of the weights, are trained and "
        "not scored; ZeRO-3 gathers all of them on every rank, whichever its tokens go to "
        "(docs/scaling.md)"
    )


def _targeted_towers(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The largest parts of the model that text never runs through (a vision tower), and in which
    the names of linears that get adapters occur."""
    decoder = decoder_of(model)
    reached = {id(each) for part in (decoder.body, decoder.head) for each in part.modules()}
    ends = tuple(f".{target}" for target in _adapter_targets(model, config))

    def unreached(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if not any(id(each) in reached for each in module.modules()):
            yield path, module
        elif id(module) not in reached:
            for name, child in module.named_children():
                yield from unreached(f"{path}.{name}", child)

    return [
        path.removeprefix(".")
        for path, part in unreached("", model)
        if any(f"{path}.{inner}".rstrip(".").endswith(ends) for inner, _ in part.named_modules())
    ]


def _adapter_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """peft's own "all-linear" does not know `transformers` models with adapters built in."""
    if config.target_modules != "all-linear":
        return config.target_modules
    architecture = decoder_of(model).architecture
    return sorted({path.rsplit(".", 1)[-1] for path in architecture.linears})
