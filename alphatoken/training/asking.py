"""What a model is asked during its training: the tasks of `train.evaluate`."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from alphatoken.data.tokenizer import stop_tokens
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.evaluation.comparison import compare
from alphatoken.evaluation.evaluate import judged
from alphatoken.evaluation.judge import Judge
from alphatoken.evaluation.measures import MEASURES
from alphatoken.evaluation.results import (
    Evaluation,
    read_evaluation,
    result_of,
    write_evaluation,
)
from alphatoken.models.decoder import decoder_of
from alphatoken.passes.divided_attention import undivided
from alphatoken.training.setup import Run
from alphatoken.util.files import fingerprint
from alphatoken.util.metrics import Metrics


def ask(
    run: Run, done: int, on_batch: Callable[[], None], on_program: Callable[[], None]
) -> Metrics:
    """What the tasks of `train.evaluate` find after `done` optimizer steps,
    `eval_<measure>/<task>`; every item is written into the run's folder. Ranks that divide rows
    in training answer whole ones meanwhile.

    Every rank must call it. `on_batch` is called before each micro-batch, on all ranks, and may
    raise on all of them to give up, which writes nothing; `on_program` before each program, which
    every rank runs a share of.
    """
    if not run.tasks:
        return {}
    judge = Judge(
        model=run.model.lm,
        token_losses=run.model.token_losses,
        tokenizer=run.tokenizer,
        stop_tokens=stop_tokens(run.config.model, run.tokenizer),
        device=run.device,
        batch_size=run.config.evaluation.batch_size,
        on_batch=on_batch,
        on_program=on_program,
    )
    with undivided(decoder_of(run.model.lm)):
        evaluation = judged(run.config, run.tasks, judge, f"{run.folder.path}, step {done}")
    collectives.on_rank_0(
        lambda: write_evaluation(run.folder.evaluation(done), evaluation, run.config.evaluation)
    )
    return metrics_of(evaluation)


def metrics_of(evaluation: Evaluation) -> Metrics:
    """Every measure of every task by its name in the metrics."""
    return {
        f"eval_{measure.name}/{name}": measure.value(task.items)
        for name, task in evaluation.tasks.items()
        for measure in MEASURES[task.task]
    }


def questions_of(run: Run, metric: str) -> str | None:
    """A hash of what decides a metric's value besides the model: the settings and the items of its
    task. None of a metric of `data.eval`, whose rows are the same in all of a run."""
    _, _, name = metric.partition("/")
    for task in run.tasks:
        if task.settings.called == name:
            asked = result_of(task.settings, run.config, task.questions.results())
            return fingerprint([asked.task, asked.settings, [item["id"] for item in asked.items]])
    return None


def show_change(run: Run, done: int, console: Console) -> None:
    """Prints how the evaluation after `done` steps differs from that before training, where both
    were made, or why they cannot be compared; for rank 0."""
    before, after = run.folder.evaluation(0), run.folder.evaluation(done)
    if not (before.exists() and after.exists()):
        return
    try:
        found = compare(read_evaluation(before), read_evaluation(after), run.config.evaluation)
    except UserError as error:  # as where the run was continued with other tasks
        console.print(f"not compared: {error}", markup=False, soft_wrap=True)
        return
    console.print(found.table())
    console.print(found.sentence(), markup=False, soft_wrap=True)
