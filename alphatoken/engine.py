"""DeepSpeed: process group, configuration, model and tokenizer loading, and engine."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from alphatoken import zero3
from alphatoken.architectures import Decoder, decoder_of
from alphatoken.compatibility import architecture_of_config, check_attention, check_valuation
from alphatoken.config import LoraConfig, ModelConfig, OptimConfig, RunConfig
from alphatoken.errors import UserError

# What a DeepSpeed configuration may not say, because one of our fields does.
OUR_FIELDS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bfloat16": "model.dtype",
    "steps_per_print": "logging.every",
    "wandb": "logging.wandb",
    "tensorboard": "logging.wandb",
    "csv_monitor": "logging.wandb",
}

# What divides a model otherwise than by ZeRO. All ranks are data-parallel here: gradients,
# values and counts are summed over them all, and a rank's tower sees whole sequences and whole
# layers (docs/launching.md says what is missing).
PARALLELISMS = {
    "sequence_parallel_size": "sequence",
    "tensor_parallel": "tensor",
    "pipeline": "pipeline",
    "expert_parallel": "expert",
}

DEFAULT_DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,  # DeepSpeed issues 5545 and 5347 report races with it
        "contiguous_gradients": True,
    }
}


def read_deepspeed_config(config: Path | dict[str, Any] | None) -> dict[str, Any]:
    """The user's DeepSpeed configuration, or plain ZeRO-3. Raises UserError for keys that are ours,
    and for "auto"."""
    if config is None:
        return DEFAULT_DEEPSPEED
    if isinstance(config, dict):
        values, origin = config, "deepspeed.config"
    else:
        origin = str(config)
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read deepspeed.config {origin}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"deepspeed.config {origin} is not valid JSON: {error}") from None
    for key, field in OUR_FIELDS.items():
        if key in values:
            raise UserError(f"{origin} sets {key!r}; remove it and set {field} instead")
    for key, name in PARALLELISMS.items():
        if key in values:
            raise UserError(
                f"{origin} sets {key!r}, but {name} parallelism is not supported: every rank "
                "trains on whole sequences "
                "with all layers. Remove it; zero_optimization and train.gradient_checkpointing "
                "make room instead"
            )
    if "writer" in values.get("checkpoint", {}):
        raise UserError(
            f"{origin} sets checkpoint.writer; remove it: a checkpoint's files are hashed when "
            "they are whole, which "
            "writing in the background does not tell"
        )
    for key in _auto_keys(values):
        raise UserError(
            f'{origin}: {key} is "auto"; write the value, or leave the key out for '
            "DeepSpeed's default"
        )
    return values


def _auto_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if value == "auto":
            yield prefix + key
        elif isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{key}.")


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run. Raises UserError when batches cannot be dealt
    to the ranks."""
    train = config.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            "train.micro_batch_size="
            f"{train.micro_batch_size} times {world_size} ranks = {per_pass}"
        )
    shared = _shared_config(config)
    adam = config.valuation.enabled and config.valuation.preconditioner == "adam"
    if adam and not shared.get("zero_optimization", {}).get("stage", 0):
        raise UserError(
            "valuation.preconditioner=adam reads the optimizer's moments from ZeRO's shards: set "
            "zero_optimization.stage to 1, 2 or 3 in deepspeed.config"
        )
    return {
        **shared,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // per_pass,
        "gradient_clipping": config.optim.clip,
    }


def without_ranks(deepspeed_values: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's DeepSpeed configuration that does not depend on the number of ranks."""
    return {
        key: each
        for key, each in deepspeed_values.items()
        if key not in ("gradient_accumulation_steps", "checkpoint")
    }


# Weights are gathered for the module that runs, and released after it; by default DeepSpeed
# keeps up to 1e9 elements.
FRUGAL = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def inference_config(config: RunConfig, offload: bool = False) -> dict[str, Any]:
    """The same for running a model forward only, on any number of ranks, with few weights held
    unless told.

    `offload` keeps its shards in host memory. Raises UserError where there are no shards.
    """
    values = {**_shared_config(config), "train_micro_batch_size_per_gpu": 1}
    zero = values.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero = {**FRUGAL, **zero, **({"offload_param": {"device": "cpu"}} if offload else {})}
    elif offload:
        raise UserError(
            "reference.offload=true needs zero_optimization.stage=3 in deepspeed.config"
        )
    return {**values, "zero_optimization": zero}


def _shared_config(config: RunConfig) -> dict[str, Any]:
    values = read_deepspeed_config(config.deepspeed.config)
    offload = values.get("zero_optimization", {}).get("offload_param", {}).get("device", "none")
    if offload == "nvme" and (config.valuation.enabled or config.needs_reference):
        raise UserError(
            "zero_optimization.offload_param.device=nvme is not possible with valuation or a "
            "reference, which read the "
            "weight shards: use cpu"
        )
    return {
        **values,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,  # our own report speaks instead
    }


def visible_devices() -> tuple[str, int]:
    """What this rank computes on (`cuda`, `cpu`), and how many of them it sees; needs no process
    group."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return accelerator.device_name(), accelerator.device_count()


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory; of the machine's for a CPU."""
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().total_memory(device.index))


def initialise_ranks() -> torch.device:
    """Joins the process group that the launcher described in the environment, or forms one of a
    single process.

    Returns this rank's device.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ["MASTER_PORT"] = str(port)
    # DeepSpeed calls collectives by names that torch 2.13 renames; a user can do nothing about
    # it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if os.environ["RANK"] != "0" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Compiling DeepSpeed's shared-memory all-reduce takes half a minute and a compiler;
        # gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            local_ranks = int(
                os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
            )
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
        device = torch.device("cpu")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    return device


def build_optimizer(
    model: nn.Module, config: OptimConfig, deepspeed_values: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW without weight decay on norms and biases; DeepSpeed's CPU version where the states are
    offloaded.

    (Unless the DeepSpeed configuration says `zero_force_ds_cpu_optimizer: false`; that version has
    to be compiled.)
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if len(zero3.full_shape(p)) >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if len(zero3.full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    offload = (
        deepspeed_values.get("zero_optimization", {})
        .get("offload_optimizer", {})
        .get("device", "none")
    )
    if offload != "none" and deepspeed_values.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps
        )
        return offloaded
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token and the configured chat template. Raises
    UserError without one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: no tokenizer can be loaded: {error}"
        ) from None
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot read model.chat_template={config.chat_template}: {error.strerror}"
            ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding has no label, so EOS keeps its own
    return tokenizer


def check_before_loading(config: RunConfig, here: bool = True) -> None:
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
    check_attention(model_config, config.model.attn_implementation, config.model.dtype, here)
    if config.data.packing and architecture.recurrent:
        raise UserError(
            f"data.packing=true is not possible with {model_config.model_type}: its "
            "linear-attention layers carry a "
            "state from one document into the next"
        )
    if config.valuation.enabled:
        check_valuation(model_config, config.valuation.layers)


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[int]:
    """Every token that ends a turn: the tokenizer's and those that stop generation."""
    stops: Any = generation.eos_token_id if generation is not None else None
    return sorted(
        {
            tokenizer.eos_token_id,
            *(stops if isinstance(stops, list) else [stops] if stops is not None else []),
        }
    )


def stop_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_token_ids` of a model that is not loaded."""
    try:
        generation = GenerationConfig.from_pretrained(config.name_or_path)
    except OSError:  # as loading does where there is no such file
        generation = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(config.name_or_path)
        )
    return eos_token_ids(tokenizer, generation)


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
    """The same model on the meta device, from its `config.json` alone, with the named attention
    implementation."""
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
    import deepspeed

    for layer in decoder.layers:
        parts = dict(layer.named_modules())
        for part, weight in decoder.architecture.external_weights:
            if part in parts:
                deepspeed.zero.register_external_parameter(
                    parts[part], parts[part].get_parameter(weight)
                )


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


def build_engine(
    model: nn.Module, config: RunConfig, deepspeed_values: dict[str, Any], total_steps: int
) -> Any:
    """The DeepSpeed engine around `model`, with optimizer and learning-rate schedule."""
    import deepspeed

    optimizer = build_optimizer(model, config.optim, deepspeed_values)
    schedule = get_scheduler(
        "constant_with_warmup" if config.optim.schedule == "constant" else config.optim.schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.optim.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_values,
        dist_init_required=False,
    )
    return engine


def build_inference_engine(
    model: nn.Module, deepspeed_values: dict[str, Any], device: torch.device
) -> None:
    """Lets a model run forward without an optimizer: below stage 3 on this rank's device, else by
    DeepSpeed's hooks."""
    if deepspeed_values.get("zero_optimization", {}).get("stage", 0) < 3:
        model.to(device)
        return
    import deepspeed

    deepspeed.initialize(model=model, config=deepspeed_values, dist_init_required=False)
