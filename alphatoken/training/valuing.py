"""Values of all tokens of a dataset under one model, which is not trained."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Section
from alphatoken.config.valuation import ValuationConfig
from alphatoken.data.batches import Layout, row_tokens
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.models.decoder import evaluating
from alphatoken.models.identity import model_identity
from alphatoken.objectives.base import Objective
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.select import select
from alphatoken.selection.step import vetoes_on_b
from alphatoken.store.filling import fill
from alphatoken.store.rows_folder import RowsFolder
from alphatoken.store.values import CONTENTS, FORMAT_VERSION, VALUE, rows_settings, store_folder
from alphatoken.training.feed import Feed, held_out_refresh
from alphatoken.training.setup import Run, build_run
from alphatoken.util.memory import peak_memory
from alphatoken.util.wording import plural
from alphatoken.values.algebra import TERMS

BLOCK_ROWS = 512
"""The most rows that are written together, and lost together by a kill."""
LEAST_BLOCK_ROWS = 64
"""Small datasets are written in eighths, but in no smaller parts than this."""


def check_valuing(config: RunConfig) -> None:
    """What can be known before weights are read. Raises UserError."""
    if not config.valuation.enabled:
        raise UserError(
            "valuation.enabled=false: there is nothing to value tokens by; set it to true"
        )
    if config.train.sequence_parallel > 1:
        raise UserError(
            f"train.sequence_parallel={config.train.sequence_parallel}: values are kept by whole "
            "responses here, so rows cannot be divided over ranks; leave it at 1"
        )
    if config.valuation.start_step:
        raise UserError(
            f"valuation.start_step={config.valuation.start_step}: a model that is not trained has "
            "no later steps; leave it at 0"
        )
    if config.valuation.held_out == "train":
        raise UserError(
            "valuation.held_out=train takes held-out rows from data.train, whose rows are all "
            "valued here: those of the held-out ones would be measured by their own gradient; "
            "leave it at validation, and set data.validation to rows that data.train leaves out "
            "({path: FILE, first: N}, with {path: FILE, skip: N} in data.train)"
        )
    _check_balance(config.valuation)
    if config.needs_store:
        raise UserError(
            "selection reads stored values (policy or veto.by is stored), which are made here; "
            "leave that to the run that trains by them"
        )
    if config.selection.scope == "global_batch":
        raise UserError(
            "selection.scope=global_batch chooses among the rows of an optimizer step, of which "
            "there is none here; choose sequence or micro_batch"
        )


def _check_balance(valuation: ValuationConfig) -> None:
    """Refuses to balance a stability that may not be zero. Where the starting weights are the
    reference it is, and `balance` changes nothing."""
    stability = valuation.reference is not None and valuation.stability_weight > 0
    if valuation.balance == "std" and stability:
        raise UserError(
            "valuation.balance=std divides by standard deviations that are measured in the steps "
            "before, of which there are none here: with "
            f"valuation.reference={valuation.reference} stability is not zero, and would count "
            "nothing; set valuation.balance=none, where valuation.stability_weight multiplies "
            "stability as it is, or valuation.stability_weight=0"
        )


def run_valuing(config: RunConfig) -> None:
    """Values every response token of `data.train` by the configured model and says where the
    values are. Every rank must call it."""
    check_valuing(config)
    objective: Objective = SupervisedObjective()
    if isinstance(config, PreferenceRunConfig):
        objective = PreferenceObjective(config.preference)
    run = build_run(config, objective)
    if run.continuation is not None:
        raise UserError(
            f"{config.train.output_dir} holds a run with checkpoints, and values are of "
            "model.name_or_path as it is loaded: name an export of the run there, and another "
            "folder in train.output_dir"
        )
    console = Console(highlight=False, quiet=collectives.rank() != 0)
    for line in (*run.data_lines(), *run.notes, *_notes_on_b(run)):
        console.print(line, markup=False, soft_wrap=True)
    began = time.monotonic()
    folder = value_rows(run)
    if collectives.rank() == 0:
        took = timedelta(seconds=round(time.monotonic() - began))
        memory = f"{peak_memory(run.device) / 2**30:.2f} GiB"
        console.print(
            f"{folder}: values of {plural(len(run.splits.train), 'row')}; {took}, peak memory of "
            f"rank 0 {memory}",
            markup=False,
            soft_wrap=True,
        )


def _notes_on_b(run: Run) -> list[str]:
    """How many values have a part of their own in B, for the log."""
    if not run.config.valuation.contrast:
        return []
    count, valued = len(set(Feed(run).rows_of_b(0).tolist())), len(run.splits.train)
    return [
        f"B (valuation.contrast) is of {count} of the {plural(valued, 'row')} that are valued: the "
        "gradient of their own tokens is in it, which lowers their values"
    ]


def value_rows(run: Run) -> Path:
    """The folder with the values of every response token of `data.train`; what it has already is
    not computed again. The run is of a configuration that `check_valuing` lets pass.

    Held-out rows and B are those of a run's first step. Rows are laid out in micro-batches of
    `train.micro_batch_size` in order of length, within blocks of rows that are written together,
    whatever the number of ranks is. Every rank must call it. Raises UserError where the folder
    holds the values of something else, or one is not finite.
    """
    config, part = run.config, run.splits.train
    folder = RowsFolder(store_folder(config), len(part), _settings(run), CONTENTS)
    if folder.done() == len(part):
        return folder.path
    tokens = sum(report.response_tokens for report in part.reports)
    own_tokens = math.ceil(tokens / collectives.world_size())
    scorer = run.model.scorer
    assert scorer is not None, "valuation is enabled"
    with evaluating(run.model.lm), torch.no_grad(), scorer.without_later_steps():
        feed = Feed(run)
        refresh = held_out_refresh(run, feed)
        assert refresh is not None, "there is a scorer"
        refresh.before(0, own_tokens)
        fill(
            folder,
            part,
            lambda batch: _columns(run, batch),
            layout=lambda rows: Layout(
                size=config.train.micro_batch_size,
                pad_token=run.tokenizer.pad_token_id,
                row_tokens=row_tokens(config),
                noise_key=(config.train.seed, 0) if config.needs_noise else None,
                by_row=feed.by_row(part),
            ),
            block_rows=min(BLOCK_ROWS, max(LEAST_BLOCK_ROWS, math.ceil(len(part) / 8))),
            device=run.device,
            title="Values of data.train",
            number="a value",
        )
    return folder.path


def _columns(run: Run, batch: Batch) -> dict[str, Tensor]:
    """What is kept of each response token."""
    if run.reference is not None and run.reference.is_online:
        run.reference.complete([batch])
    facts = run.model.assess(batch)
    weighed = select(run.model.selections, facts)
    kept_BT = facts.response_index.put(weighed.choice.kept_R)
    others = {"composite"} if run.config.valuation.split_terms else {"composite", *TERMS}
    terms = {name: term_BT for name, term_BT in facts.values.items() if name not in others}
    return {
        "id": batch["targets"].int(),
        VALUE: facts.composite_BT,
        **terms,
        "nll": facts.nll_BT,
        "kept": kept_BT,
    }


def _settings(run: Run) -> dict[str, object]:
    """What decides the values."""
    config = run.config
    model_sha256, _ = model_identity(dict(run.model.lm.named_parameters()), run.device)
    return {
        "format_version": FORMAT_VERSION,
        **rows_settings(config, run.tokenizer, run.splits.train),
        "model_sha256": model_sha256,
        "dtype": config.model.dtype,
        # The scale of adapters is in none of their weights.
        "lora": None if config.model.lora is None else config.model.lora.model_dump(mode="json"),
        "validation": run.inputs["data.validation"],
        "fisher": run.inputs["valuation.fisher"],
        "reference": run.inputs["reference.model"],
        "seed": config.train.seed,
        "micro_batch_size": config.train.micro_batch_size,
        "packing": config.data.packing,
        # The order of data.train, which rows of B are taken from.
        "global_batch_size": config.train.global_batch_size,
        "weights": run.splits.train.weights,
        # Key by key, so that a difference is named by its key.
        **_keys("valuation", config.valuation, without={"fisher", "reference"}),
        **_keys("selection", config.selection, without={"store"}),
        **(
            _keys("preference", config.preference, without=set())
            if isinstance(config, PreferenceRunConfig)
            else {}
        ),
        **(
            _keys("optim", config.optim, without=set())
            if config.valuation.preconditioner == "adam"
            else {}
        ),
        # In older versions B held what is vetoed; said only where that makes a difference, so that
        # other stores of those versions are still what is asked for.
        **(
            {} if vetoes_on_b(config) is None else {"B without what selection.veto rules out": True}
        ),
    }


def _keys(section: str, values: Section, without: set[str]) -> dict[str, object]:
    dumped = values.model_dump(mode="json", exclude=without)
    return {f"{section}.{key}": value for key, value in dumped.items()}
