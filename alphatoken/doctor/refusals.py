"""What a run would refuse before its first step, one by one; each raises UserError as the run
would, or tells what it found."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken.checkpoints.files import free_bytes
from alphatoken.checkpoints.resuming import find_checkpoint
from alphatoken.checkpoints.universal import bytes_to_convert
from alphatoken.config.run import RunConfig
from alphatoken.data.chat import Encoder
from alphatoken.data.splits import Splits, check_sizes, load_prompts, positions_note
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.distributed.settings import deepspeed_config
from alphatoken.doctor.findings import Finding
from alphatoken.models.decoder import decoder_of
from alphatoken.models.loading import (
    attention_of,
    check_before_loading,
    experts_note,
    model_without_weights,
)
from alphatoken.reference.losses import check_reference
from alphatoken.stability.of_run import check_files
from alphatoken.training.trackers import check_trackers
from alphatoken.util.wording import plural, size
from alphatoken.values.registry import scorer_class


def batches(config: RunConfig, ranks: int) -> str:
    """The rows of a step, dealt to the ranks."""
    values: dict[str, Any] = deepspeed_config(config, ranks)
    train, passes = config.train, values["gradient_accumulation_steps"]
    stage = values.get("zero_optimization", {}).get("stage", 0)
    dealt = (
        f"{train.global_batch_size} rows a step = {plural(ranks, 'rank')} x "
        f"{plural(passes, 'pass')}"
    )
    return f"{dealt} x {train.micro_batch_size}; ZeRO stage {stage}"


def model(config: RunConfig) -> PreTrainedModel:
    """The model without its weights, with its adapters; any attention does for that."""
    shapes = model_without_weights(config.model, "eager")
    decoder_of(shapes).freeze_unreached()
    return shapes


def model_settings(config: RunConfig, device: torch.device) -> str:
    """What its configuration and a run's settings say to each other."""
    check_before_loading(config)
    if config.valuation.enabled:
        scorer = scorer_class(config.valuation.estimator)
        scorer.check(config.model, config.valuation, device)
    valued = (
        f"the last {config.valuation.layers} layers"
        if config.valuation.layers != "all"
        else "all layers"
    )
    scoring = (
        f"{config.valuation.estimator} on {valued}" if config.valuation.enabled else "no valuation"
    )
    return f"{attention_of(config.model)} attention, {scoring}"


def about_model(config: RunConfig, shapes: PreTrainedModel) -> str:
    total = sum(parameter.numel() for parameter in shapes.parameters())
    trained = sum(parameter.numel() for parameter in shapes.parameters() if parameter.requires_grad)
    part = "" if trained == total else f", {trained:,} of them trained"
    experts = experts_note(shapes)
    return f"{type(shapes).__name__}, {total:,} parameters{part}, {config.model.dtype}" + (
        "" if experts is None else f"; {experts}"
    )


def tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """One that rows can be encoded with."""
    loaded = load_tokenizer(config.model)
    Encoder(loaded, config.data.max_length)
    return loaded


def about_tokenizer(loaded: PreTrainedTokenizerBase) -> str:
    template = (
        "a chat template"
        if loaded.chat_template
        else "no chat template: rows are prompt, response, EOS"
    )
    tokens = f"EOS {loaded.eos_token}, padding {loaded.pad_token}"
    return f"{type(loaded).__name__} with {len(loaded):,} tokens, {tokens}, {template}"


def reference(config: RunConfig, loaded: PreTrainedTokenizerBase) -> str:
    check_reference(config, loaded)
    if not config.needs_reference:
        return "not needed"
    return f"losses of {config.reference.model or 'the starting model'}, {config.reference.mode}"


def stability(config: RunConfig) -> str:
    check_files(config)
    if config.valuation.fisher is not None:
        return f"{config.valuation.fisher} can be read"
    return "estimated before training" if config.estimates_fisher else "not needed"


def trackers(config: RunConfig) -> str:
    check_trackers(config.logging)
    return ", ".join(config.logging.trackers) or "none"


def prompts(config: RunConfig, loaded: PreTrainedTokenizerBase, splits: Splits) -> str:
    if not config.estimates_fisher:
        return "none are needed"
    return str(load_prompts(config, loaded, splits.train))


def sizes(config: RunConfig, splits: Splits) -> Finding:
    check_sizes(splits, config)
    parts = [f"{name} {plural(len(part), 'row')}" for name, part in splits.named().items()]
    steps = plural(config.train.total_steps(len(splits.train)), "step")
    return Finding("rows", "ok", f"{', '.join(parts)}; a run of {steps}")


def positions(config: RunConfig, splits: Splits) -> Finding:
    """Whether the model has a position for every token of a row."""
    note = positions_note(config, splits)
    found = note or "the model has as many as rows have tokens"
    return Finding("positions", "warning" if note else "ok", found)


def run_folder(config: RunConfig, ranks: int) -> Finding:
    """Whether a run may start in its folder, or where it continues, and whether there is room to
    convert that for as many ranks; for rank 0."""
    found = find_checkpoint(config, ranks)
    if found is None:
        return Finding("run folder", "ok", f"{config.train.output_dir}: a new run")
    notes = "".join(f"; {note}" for note in found.notes)
    suspicious = any(note.severity == "warning" for note in found.notes)
    text = f"{config.train.output_dir}: continues after step {found.step}{notes}"
    needed = bytes_to_convert(found.checkpoint) if found.universal else 0
    if needed:
        free = free_bytes(found.checkpoint)
        text += f"; that takes {size(needed)} beside it, where {size(free)} are free"
        if free < needed:
            fix = f"make room for {size(needed - free)} more, or start on as many ranks as wrote it"
            return Finding("run folder", "failed", text, fix)
    return Finding("run folder", "warning" if suspicious else "ok", text)
