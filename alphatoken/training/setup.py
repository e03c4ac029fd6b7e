"""What a training run is made of, built in the only order that works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken.checkpoints.folder import RunFolder
from alphatoken.checkpoints.resuming import Continuation, open_run_folder
from alphatoken.config.preference import BRANCHES
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import FisherConfig
from alphatoken.data.audit import look_at_rows
from alphatoken.data.chat import tokenizer_identity
from alphatoken.data.splits import (
    Prompts,
    Splits,
    load_prompts,
    load_splits,
    positions_note,
)
from alphatoken.data.tokenizer import (
    load_tokenizer,
    stop_at_end_of_turn,
    stop_tokens,
    tokens_of,
    vocabulary_note,
)
from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.adam_scale import AdamScale, FirstMoment
from alphatoken.distributed.engine import build_engine
from alphatoken.distributed.mesh import form_mesh
from alphatoken.distributed.ranks import (
    initialise_ranks,
    tensor_limit,
    use_deterministic_kernels,
)
from alphatoken.distributed.settings import deepspeed_config, without_ranks
from alphatoken.evaluation.evaluate import build_tasks
from alphatoken.evaluation.rows import Task
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.loading import adapters_note, experts_note, load_model, settle_model
from alphatoken.models.recomputing import recompute_layers
from alphatoken.objectives.base import Objective
from alphatoken.passes.divided_attention import divide_attention, undivided
from alphatoken.passes.head_shares import HeadShares
from alphatoken.reference.losses import Reference, check_reference
from alphatoken.selection.step import selections_at, vetoes_on_b
from alphatoken.stability.drift import Drift
from alphatoken.stability.estimate import estimate_fisher
from alphatoken.stability.of_run import build_drift, check_files
from alphatoken.store.rows_folder import StoredColumn
from alphatoken.store.values import VALUE, columns_of, identity_of_store
from alphatoken.training.trackers import check_trackers
from alphatoken.training.valued_model import ValuedModel
from alphatoken.util.files import fingerprint
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.registry import build_scorer, scorer_class, valuation_notes


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a training run is made of. Nothing here is replaced while it trains."""

    config: RunConfig
    objective: Objective
    device: torch.device
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    total_steps: int
    """Optimizer steps of the whole run."""
    model: ValuedModel
    """The module that the engine wraps; its `scorer` is None without valuation."""
    engine: Any
    drift: Drift | None
    """Stability's; None where it counts nothing."""
    adam_scale: AdamScale | None
    """For `valuation.preconditioner: adam`."""
    reference: Reference | None
    tasks: Sequence[Task]
    """What the model is asked at evaluations; of `train.evaluate`."""
    stored: StoredColumn | None
    """Values of the rows of `data.train` that were made before; of `selection.store`."""
    inputs: dict[str, str | None]
    """Hashes of everything that a continued run must share with the one before, by name."""
    continuation: Continuation | None
    """The checkpoint to go on from, not loaded yet."""
    notes: tuple[str, ...]
    """What the user should know before training starts."""
    stopwatch: Stopwatch

    def data_lines(self) -> list[str]:
        """What became of the rows of each source, for the user."""
        named = self.splits.named().items()
        return [f"{name}: {report}" for name, part in named for report in part.reports]


def build_run(config: RunConfig, objective: Objective) -> Run:
    """Builds the parts of a run; every rank must call it.

    Raises UserError for whatever can be known to be wrong before training starts. Writes nothing
    into the run folder but the Fisher, where that has to be estimated.
    """
    # What is wrong with the configuration, files and folders is found before weights are read.
    device, engine_config = _join(config)
    tokenizer = load_tokenizer(config.model)
    config = _settled(config, tokenizer, device)
    folder, continuation = open_run_folder(config)
    if continuation is not None and continuation.universal:
        checkpoint_config = engine_config.get("checkpoint", {})
        engine_config["checkpoint"] = {**checkpoint_config, "load_universal": True}
    # One that has to tokenise longer than the others must not keep them waiting for weights.
    splits = collectives.agree(lambda: load_splits(config, tokenizer))
    stored = _stored_values(config, tokenizer, splits)
    notes = collectives.on_rank_0(lambda: _data_notes(config, tokenizer, splits))
    tasks = build_tasks(config, tokenizer, config.asked)
    prompts = load_prompts(config, tokenizer, splits.train) if config.estimates_fisher else None
    total_steps = config.train.total_steps(len(splits.train))
    notes.append(_kept_note(config, total_steps))

    stopwatch = Stopwatch(device)
    lm = _load(config, engine_config, tokenizer)
    notes += [
        *_model_notes(config, lm, tokenizer),
        *(n for task in tasks for n in task.questions.notes),
    ]
    decoder = _decoder(config, lm)
    model = ValuedModel(
        decoder=decoder,
        objective=objective,
        selections=selections_at(config, 0, total_steps),
        eos_token_ids=stop_tokens(config.model, tokenizer),
        stopwatch=stopwatch,
        needs_entropy=config.needs_entropy,
        vetoes=vetoes_on_b(config),
    )
    engine = _engine_around(model, config, engine_config, total_steps)

    # By default stability and the reference losses are measured from the weights the run starts
    # with: both are built when the engine has its masters, and before a checkpoint is loaded.
    drift, adam_scale = None, None
    if config.valuation.enabled:
        notes += valuation_notes(decoder, config.valuation)
        drift = _build_drift(config, decoder, tokenizer, prompts, device, notes)
        if config.valuation.preconditioner == "adam":
            adam_scale = AdamScale(engine=engine, optim=config.optim, device=device)
        scorer = build_scorer(decoder, config.valuation, device, drift, adam_scale)
        if config.valuation.contrast_source == "moment":
            scorer.first_moment = FirstMoment(engine=engine, optim=config.optim, device=device)
        model.attach(scorer)
    reference = None
    if config.needs_reference:
        with undivided(decoder):
            reference = _build_reference(config, model, objective, tokenizer, splits, device)
    inputs = {
        **{name: fingerprint(part.identity) for name, part in splits.named().items()},
        "model.tokenizer": tokenizer_identity(tokenizer),
        "deepspeed.config": fingerprint(without_ranks(engine_config, config)),
        "reference.model": None if reference is None else reference.identity,
        "valuation.fisher": None if drift is None else drift.identity(),
        "selection.store": identity_of_store(config) if config.needs_store else None,
    }
    return Run(
        config=config,
        objective=objective,
        device=device,
        folder=folder,
        tokenizer=tokenizer,
        splits=splits,
        total_steps=total_steps,
        model=model,
        engine=engine,
        drift=drift,
        adam_scale=adam_scale,
        reference=reference,
        tasks=tasks,
        stored=stored,
        inputs=inputs,
        continuation=continuation,
        notes=tuple(notes),
        stopwatch=stopwatch,
    )


def _stored_values(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits
) -> StoredColumn | None:
    if not config.needs_store:
        return None
    return collectives.agree(lambda: columns_of(config, tokenizer, splits.train))[VALUE]


def _data_notes(config: RunConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> list[str]:
    """What the user should know of the rows."""
    beyond = positions_note(config, splits)
    return [*look_at_rows(config, tokenizer), *([] if beyond is None else [beyond])]


def _kept_note(config: RunConfig, total_steps: int) -> str:
    """Which tokens are trained on from the first step that chooses on."""
    first = config.valuation.start_step
    kept = [str(selection) for selection in selections_at(config, first, total_steps)]
    if len({*kept}) > 1:
        kept = [f"{branch}: {rule}" for branch, rule in zip(BRANCHES, kept, strict=True)]
    after = f", after {first} steps on all" if first else ""
    moves = any(section.schedule != "constant" for section in config.selections)
    return f"what is kept{' at first' if moves else ''}: {'; '.join(dict.fromkeys(kept))}{after}"


def _join(config: RunConfig) -> tuple[torch.device, dict[str, Any]]:
    """Joins the other ranks: this one's device, and DeepSpeed's configuration for all of them."""
    if config.train.deterministic:
        use_deterministic_kernels()
    minutes = config.deepspeed.timeout_minutes
    device = initialise_ranks(minutes)
    collectives.on_rank_0(lambda: check_trackers(config.logging))
    engine_config = deepspeed_config(config, collectives.world_size())
    form_mesh(config.train.sequence_parallel, tensor_limit(minutes))
    return device, engine_config


def _settled(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> RunConfig:
    """The configuration with everything decided that depends on this machine. Raises UserError for
    what is known to be wrong before weights are read."""
    config = settle_model(config)
    if config.valuation.enabled:
        scorer = scorer_class(config.valuation.estimator)
        scorer.check(config.model, config.valuation, device)
    check_reference(config, tokenizer)
    check_files(config)
    return config


def _load(
    config: RunConfig, engine_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    model = load_model(config.model, engine_config, config.train.seed, tokens_of(tokenizer))
    if config.train.gradient_checkpointing:
        recompute_layers(model, offload=config.train.gradient_checkpointing == "offload")
    return model


def _decoder(config: RunConfig, lm: PreTrainedModel) -> Decoder:
    """The decoder that is trained, whose layers take rows as they are dealt."""
    decoder = decoder_of(lm.train())
    decoder.freeze_unreached()
    if config.train.sequence_parallel > 1:
        divide_attention(decoder)
    return decoder


def _model_notes(
    config: RunConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What differs from the model as published, once `lm` stops where turns end, and from a run
    whose ranks have whole rows."""
    parts = config.train.sequence_parallel
    shares = HeadShares.of_model(lm.config, parts)
    found = (
        vocabulary_note(config.model, tokenizer),
        stop_at_end_of_turn(lm.generation_config, config.model, tokenizer),
        adapters_note(lm, config.model),
        experts_note(lm),
        None
        if parts == 1
        else f"rows are divided over groups of {parts} ranks, so the report shows no responses: no "
        "rank has a whole one",
        None if shares.are_even else shares.told,
    )
    return [note for note in found if note is not None]


def _engine_around(
    model: ValuedModel, config: RunConfig, engine_config: dict[str, Any], total_steps: int
) -> Any:
    engine = build_engine(model, config, engine_config, total_steps)
    model.engaged(partial(zero3.knows_order, engine))
    return engine


def _build_reference(
    config: RunConfig,
    model: ValuedModel,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    device: torch.device,
) -> Reference:
    wanted = {"data.train"}
    if objective.branches:
        wanted.add("data.eval")
    if config.valuation.target == "preference":
        wanted.add("data.validation")
    return Reference(
        config=config,
        tokenizer=tokenizer,
        parts={name: part for name, part in splits.named().items() if name in wanted},
        decoder=decoder_of(model.lm),
        starting_losses=model.token_losses,
        device=device,
    )


def _build_drift(
    config: RunConfig,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | None,
    device: torch.device,
    notes: list[str],
) -> Drift | None:
    """Estimates the Fisher first, where none is given. None where stability counts nothing."""
    fisher = config.valuation.fisher
    if prompts is not None:
        with undivided(decoder):
            fisher = estimate_fisher(config, decoder, tokenizer, prompts, device)
        notes.append(f"Fisher: {fisher}, estimated on {prompts}")
    if fisher is None:
        notes.append(
            "valuation.stability_weight=0 and no valuation.fisher: values are adaptation only"
        )
        return None
    if prompts is None and config.fisher != FisherConfig():
        notes.append("section fisher is not used: valuation.fisher is given")
    drift, note = build_drift(config, fisher, decoder, device)
    if note is not None:
        notes.append(note)
    return drift
