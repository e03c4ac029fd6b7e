"""DeepSpeed's configuration, from the run's."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alphatoken.config.run import RunConfig
from alphatoken.distributed import zero3
from alphatoken.errors import UserError
from alphatoken.util.shipped import or_shipped
from alphatoken.util.wording import as_json

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
    "sequence_parallel_size": "train.sequence_parallel",
    "steps_per_print": "logging.every",
    "wandb": "logging.report_to",
    "tensorboard": "logging.report_to",
    "csv_monitor": "logging.report_to",
}

# What divides a model otherwise than by ZeRO, and why that is not supported.
PARALLELISMS = {
    "tensor_parallel": (
        "tensor parallelism cuts linears, and values are contracted with whole ones: gradients, "
        "drift and Fisher are known by ZeRO's slices of whole weights"
    ),
    "pipeline": (
        "pipeline parallelism gives a rank some of the layers, and a rank scores tokens on the "
        "last of them right after its forward pass, before the head"
    ),
    "expert_parallel": (
        "expert parallelism shards experts over other ranks than the rest of the model, and "
        "checkpoints, drift and Fisher take every weight for sharded over all ranks"
    ),
}

# What DeepSpeed reads besides these, gone features included, which it refuses itself. It passes
# over all other keys without a word.
KNOWN_KEYS = (
    *("activation_checkpointing", "aio", "amp", "autotuning", "checkpoint", "comet"),
    *("comms_logger", "communication_data_type", "compile", "compression_training"),
    *("curriculum_learning", "data_efficiency", "data_types", "dataloader_drop_last"),
    *("datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue"),
    *("elasticity", "flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor"),
    *("graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation"),
    *("memory_breakdown", "nebula", "prescale_gradients", "progressive_layer_drop"),
    *("quantize_training", "seq_parallel_communication_data_type", "sparse_attention"),
    *("sparse_gradients", "timers", "torch_autocast", "use_data_before_expert_parallelism"),
    *("vocabulary_size", "wall_clock_breakdown", "weight_quantization"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"),
)

# What would make shards, gradients or the module something else than values, counts and
# checkpoints take them for; by dotted key, with what is wrong with it. Off is no harm.
REFUSED = {
    "zero_optimization.zero_quantized_nontrainable_weights": (
        "frozen weights would lie in int8 with scales, and values read the shards of weights"
    ),
    "zero_optimization.mics_shard_size": (
        "shards would belong to a part of the ranks, and values are put together from those of all"
    ),
    "zero_optimization.zenflow": (
        "it turns weights around between the passes, and values read them there"
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        "the fp32 masters, which drift and checkpoints are made of, change after the step has ended"
    ),
    "weight_quantization.quantized_initialization": (
        "weights would lie in integers with scales, and values read the shards of weights"
    ),
    "torch_autocast.enabled": (
        "values are computed in the dtype of the weights: set model.dtype instead"
    ),
    "gradient_allreduce_op": (
        "the loss is scaled for gradients that are averaged over ranks, which is the default"
    ),
    "hybrid_engine.enabled": "it replaces the modules that values are captured from",
    "compile.deepcompile": "it replaces the hooks and messages of ZeRO that values rely on",
    "data_efficiency.enabled": (
        "rows and their order are data.*'s, and every layer must see every token"
    ),
    "checkpoint.writer": (
        "a checkpoint's files are hashed when they are whole, which writing in the background "
        "does not tell"
    ),
    "checkpoint.use_node_local_storage": (
        "a checkpoint is one folder that every rank sees, with the hash of every file"
    ),
}
OFF: tuple[Any, ...] = (None, False, 0, -1, {}, "mean", "none")

DEFAULT_DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,  # DeepSpeed issues 5545 and 5347 report races with it
        "contiguous_gradients": True,
    }
}


def read_deepspeed_config(config: Path | dict[str, Any] | None) -> dict[str, Any]:
    """The user's DeepSpeed configuration, or plain ZeRO-3. Raises UserError for keys that are ours
    or misspelt, for "auto", and for what DeepSpeed would not take."""
    if config is None:
        return DEFAULT_DEEPSPEED
    if isinstance(config, dict):
        values, origin = config, "deepspeed.config"
    else:
        values, origin = _read_json(config), f"deepspeed.config {config}"
    _refuse_misspelt(values, origin)
    _refuse_keys(values, origin)
    _refuse_stage(values, origin)
    zero3.check_settings(values, origin)
    return values


def _read_json(file: Path) -> dict[str, Any]:
    """Raises UserError for a file that cannot be read or is not JSON, or no mapping."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(
                    f"deepspeed.config {file} gives the key {key!r} twice: remove one of them"
                )
            found[key] = value
        return found

    try:
        text = or_shipped(file).read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=mapping)
    except OSError as error:
        raise UserError(f"cannot read deepspeed.config {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"deepspeed.config {file} is not text in UTF-8: {error}") from None
    except RecursionError:
        raise UserError(f"deepspeed.config {file} is nested too deeply to be read") from None
    except UserError:
        raise
    except ValueError as error:  # numbers of too many digits, too
        raise UserError(f"deepspeed.config {file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"deepspeed.config {file} must hold a mapping such as "
            f'{{"zero_optimization": {{"stage": 3}}}}, not {as_json(values)}'
        )
    return values


def _refuse_misspelt(values: dict[str, Any], origin: str) -> None:
    """Raises UserError for keys that DeepSpeed would pass over, as they are not quite one that it
    knows, or one of `zero_optimization`; other keys, such as remarks, are left alone."""
    known = {*KNOWN_KEYS, *OUR_FIELDS, *PARALLELISMS}
    inner = set(zero3.zero_keys())
    for key in values.keys() - known:
        meant = key if key in inner else _nearest(key, known | inner)
        if meant is not None:
            section = "" if meant in known else "zero_optimization."
            raise UserError(
                f"{origin} sets {key!r}, which DeepSpeed does not know and would pass over; did "
                f"you mean {section}{meant}?"
            )


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that this one is meant for, if any. What begins with zero always is for one,
    as a run without it divides nothing over ranks."""
    plain = key.lower().replace("-", "_")
    of_zero = plain.startswith("zero")
    candidates = sorted(each for each in known if each.startswith("zero") or not of_zero)
    near = difflib.get_close_matches(plain, candidates, n=1, cutoff=0.3 if of_zero else 0.75)
    return near[0] if near and "comment" not in plain else None


def _refuse_stage(values: dict[str, Any], origin: str) -> None:
    """Raises UserError where the stage of ZeRO would be something else for DeepSpeed, which reads
    "3" and true as numbers, than for us."""
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"{origin} sets zero_optimization={as_json(zero)}: write a mapping such as "
            '{"stage": 3}, or remove it'
        )
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise UserError(
            f"{origin} sets zero_optimization.stage={as_json(stage)}: write 0, 1, 2 or 3, without "
            "quotes"
        )


def _refuse_keys(values: dict[str, Any], origin: str) -> None:
    """Raises UserError for keys that are ours or not supported, and for "auto"; `origin` names
    where the values are from."""
    for key, field in OUR_FIELDS.items():
        if key in values:
            raise UserError(f"{origin} sets {key!r}; remove it and set {field} instead")
    for key, reason in PARALLELISMS.items():
        if key in values:
            raise UserError(
                f"{origin} sets {key!r}, which is not supported: {reason}. Remove it; "
                "zero_optimization, train.gradient_checkpointing and train.sequence_parallel make "
                "room instead"
            )
    for key, reason in REFUSED.items():
        found = _value_at(values, key)
        if found not in OFF:
            raise UserError(
                f"{origin} sets {key}={as_json(found)}, which is not possible here: {reason}. "
                "Remove it"
            )
    for key in _auto_keys(values):
        raise UserError(
            f'{origin}: {key} is "auto"; write the value, or leave the key out for '
            "DeepSpeed's default"
        )


def _value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _auto_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if value == "auto":
            yield prefix + key
        elif isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{key}.")


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run. Raises UserError when batches cannot be dealt
    to the ranks."""
    train, parts = config.train, config.train.sequence_parallel
    if world_size % parts:
        raise UserError(
            f"train.sequence_parallel={parts} does not divide the number of ranks, {world_size}"
        )
    groups = world_size // parts
    per_pass = train.micro_batch_size * groups
    if train.global_batch_size % per_pass:
        dealt_to = f"{world_size} ranks" if parts == 1 else f"{groups} groups of {parts} ranks"
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size} times {dealt_to} = {per_pass}"
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
        # DeepSpeed takes every rank for one with rows of its own, and averages gradients over them.
        "train_batch_size": train.global_batch_size * parts,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // per_pass,
        "gradient_clipping": config.optim.clip,
    }


def without_ranks(deepspeed_values: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The part of a run's DeepSpeed configuration that does not depend on the number of ranks."""
    fixed = {
        key: each
        for key, each in deepspeed_values.items()
        if key not in ("gradient_accumulation_steps", "checkpoint")
    }
    return {**fixed, "train_batch_size": config.train.global_batch_size}


# Weights are gathered for the module that runs, and released after it; by default DeepSpeed
# keeps up to 1e9 elements.
FRUGAL = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def inference_config(config: RunConfig, *, offload: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration for running a model forward only, on any number of ranks.

    Few weights are held at a time unless the user's configuration says otherwise.
    `offload` keeps the shards in host memory. Raises UserError where there are no shards.
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
    offload = _value_at(values, "zero_optimization.offload_param.device")
    reads = config.valuation.enabled or config.needs_reference or config.model.resize_embeddings
    if offload == "nvme" and reads:
        raise UserError(
            "zero_optimization.offload_param.device=nvme is not possible with valuation, a "
            "reference or model.resize_embeddings, which read the weight shards: use cpu"
        )
    return {
        **values,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 2**31,  # our own report speaks instead
    }
