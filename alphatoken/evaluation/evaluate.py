"""Evaluating a model: all tasks of a configuration, under DeepSpeed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from alphatoken.config.evaluation import EvaluationTask
from alphatoken.config.run import RunConfig
from alphatoken.data.tokenizer import load_tokenizer, stop_tokens, tokens_of
from alphatoken.distributed import collectives
from alphatoken.distributed.engine import build_inference_engine
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.distributed.settings import inference_config
from alphatoken.errors import UserError
from alphatoken.evaluation.comparison import check_comparable, compare
from alphatoken.evaluation.judge import Judge
from alphatoken.evaluation.results import (
    Evaluation,
    TaskResult,
    read_evaluation,
    result_of,
    table_of,
    write_evaluation,
)
from alphatoken.evaluation.rows import Setting, Task
from alphatoken.evaluation.tasks import build_task
from alphatoken.models.decoder import decoder_of
from alphatoken.models.loading import load_model, settle_model
from alphatoken.models.token_losses import TokenLosses


def build_tasks(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[EvaluationTask]
) -> list[Task]:
    """Reads what the tasks ask. Every rank must call it. Raises UserError for bad rows, and where
    programs are to be run that this machine cannot contain."""
    setting = Setting(config, tokenizer)
    return collectives.agree(lambda: [build_task(setting, each) for each in tasks])


def judged(
    config: RunConfig, tasks: Sequence[Task], judge: Judge, model: str, *, shown: bool = False
) -> Evaluation:
    """What all tasks find of the judge's model, which is called `model`; with progress `shown`.
    Every rank must call it."""
    found = {}
    for task in tasks:
        name = task.settings.called
        items = task.judge(judge.titled(name) if shown else judge)
        found[name] = result_of(task.settings, config, items)
    return Evaluation(model, found)


def _check_target(file: Path) -> None:
    """Raises UserError where there is a file, which may be what is to be compared with, and where
    none can be written."""
    if file.exists():
        raise UserError(f"{file} exists; name another file with evaluation.output, or remove it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write the evaluation {file}: {error.strerror}; name another file with "
            "evaluation.output"
        ) from None


def _unasked(config: RunConfig, tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """The tasks by name, of whose items nothing is known yet but which they are."""
    return {
        task.settings.called: result_of(task.settings, config, task.questions.results())
        for task in tasks
    }


def run_evaluation(config: RunConfig) -> None:
    """Evaluates the configured model, writes what was found and prints it; compared with an earlier
    evaluation where one is named. Every rank must call it.

    Raises UserError for bad input before any weight is read.
    """
    if not config.evaluation.tasks:
        raise UserError(
            "evaluation.tasks is empty: say what to evaluate, as in "
            "evaluation.tasks=[{task: perplexity, data: text.jsonl}]"
        )
    device = initialise_ranks(config.deepspeed.timeout_minutes)
    deepspeed_values = inference_config(config)
    tokenizer = load_tokenizer(config.model)
    config = settle_model(config)
    file = config.evaluation.output or config.train.output_dir / "evaluation.json"
    collectives.on_rank_0(lambda: _check_target(file))
    before = config.evaluation.compare_with
    earlier = None if before is None else collectives.agree(lambda: read_evaluation(before))
    tasks = build_tasks(config, tokenizer, config.evaluation.tasks)
    console = Console(highlight=False, quiet=collectives.rank() != 0)
    for note in (note for task in tasks for note in task.questions.notes):
        console.print(note, markup=False, soft_wrap=True)
    if earlier is not None:
        check_comparable(earlier, Evaluation(config.model.name_or_path, _unasked(config, tasks)))

    model = load_model(config.model, deepspeed_values, config.train.seed, tokens_of(tokenizer))
    losses = TokenLosses(decoder_of(model.eval()))
    build_inference_engine(losses, deepspeed_values, device)
    judge = Judge(
        model=model,
        token_losses=losses,
        tokenizer=tokenizer,
        stop_tokens=stop_tokens(config.model, tokenizer),
        device=device,
        batch_size=config.evaluation.batch_size,
    )
    evaluation = judged(config, tasks, judge, config.model.name_or_path, shown=True)
    # Shown first: should the disk refuse the file, the numbers are not lost.
    if collectives.rank() == 0:
        console.print(table_of(evaluation, config.evaluation))
    collectives.on_rank_0(lambda: write_evaluation(file, evaluation, config.evaluation))
    if collectives.rank() == 0:
        console.print(str(file), markup=False, soft_wrap=True)
        if earlier is not None:
            compared = compare(earlier, evaluation, config.evaluation)
            console.print(compared.table())
            console.print(compared.sentence(), markup=False, soft_wrap=True)
