"""Where a run's numbers go besides its folder: W&B, TensorBoard, MLflow, trackio, each by
accelerate's class for it. A further tracker is an entry in `KINDS` and in `config.run.TRACKERS`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import alphatoken.training.metrics  # noqa: F401  declares what trackers are told of
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.config.file import flat
from alphatoken.config.run import RunConfig
from alphatoken.config.training import TRACKERS, LoggingConfig
from alphatoken.errors import UserError
from alphatoken.report.responses import ValuedResponse
from alphatoken.util.files import publish_text
from alphatoken.util.metrics import Metrics, as_markdown


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a tracker is started with."""

    logging: LoggingConfig
    name: str
    folder: RunFolder
    first_line: int
    """The step of the first line to come: 0 is the evaluation before training."""
    known: str | None
    """What the tracker called the run that this one continues."""


def _same(name: str) -> str:
    return name


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one tracker is used."""

    arguments: Callable[[Beginning], dict[str, Any]]
    """Of accelerate's class for it."""
    known_as: Callable[[Any], str | None] = lambda _: None
    """What the tracker calls a run that has begun, by which it is continued."""
    takes_sections: bool = False
    """Whether settings go to it in sections, and may change; else flat, and once."""
    metric: Callable[[str], str] = _same
    """Its name for a metric."""
    takes_text: bool = False
    """Whether it shows texts, so that it can be told what the metrics mean."""


def _wandb(begin: Beginning) -> dict[str, Any]:
    from wandb import Settings

    return {
        "run_name": begin.logging.project,
        "id": begin.known,
        "resume": "allow",
        "name": begin.name,
        "mode": None if begin.logging.wandb == "disabled" else begin.logging.wandb,
        "dir": begin.folder.path,
        "settings": Settings(silent=True),
    }


KINDS: dict[str, Kind] = {
    "wandb": Kind(
        arguments=_wandb, known_as=lambda begun: str(begun.tracker.id), takes_sections=True
    ),
    "tensorboard": Kind(
        # Lines of steps that are done again take the place of those before.
        arguments=lambda begin: {
            "run_name": "tensorboard",
            "logging_dir": begin.folder.path,
            "purge_step": begin.first_line,
        },
        takes_text=True,
    ),
    "mlflow": Kind(
        arguments=lambda begin: {
            "experiment_name": begin.logging.project,
            "run_name": begin.name,
            "run_id": begin.known,
        },
        known_as=lambda begun: str(begun.tracker.info.run_id),
        # It refuses other characters, and keeps files: `loss_kept` cannot be a folder as well.
        metric=lambda name: re.sub(r"[^\w\-. ]", "_", name.replace("/", ".")),
    ),
    "trackio": Kind(
        arguments=lambda begin: {
            "run_name": begin.logging.project,
            "name": begin.known or begin.name,
            "resume": "must" if begin.known else "never",
        },
        known_as=lambda begun: str(begun.tracker.name),
    ),
}


def check_trackers(logging: LoggingConfig) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    for name in logging.trackers:
        if find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"logging.report_to={name} needs the package {TRACKERS[name]}: "
                f"pip install {TRACKERS[name]}"
            )


class Trackers:
    """The trackers of one run, on rank 0. One that fails is told of and left out: all numbers are
    in the run folder anyway, and a run does not end because a server cannot be reached.

    `first_line` is the step of the first line to come, 0 in a new run. Where the run folder was
    trained in before, each continues its own run (`trackers.json`).
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, *, first_line: int, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._folder = folder
        self._first_line = first_line
        self._say = say
        self._begun: dict[str, Any] = {}
        """Accelerate's, by name; those that have not failed."""
        known = _known(folder) if first_line else {}
        for name in config.logging.trackers:
            self._attempt(name, partial(self._begin, name, known))
        if not self._begun:
            return
        try:
            publish_text(folder.trackers, json.dumps(known, indent=1) + "\n")
        except OSError as error:
            say(f"warning: {folder.trackers} cannot be written: {error}; a resumed run is another")

    def log(self, metrics: Metrics) -> None:
        """Hands on the numbers of one step."""
        for name, tracker in [*self._begun.items()]:
            renamed = {KINDS[name].metric(key): value for key, value in metrics.items()}
            self._attempt(name, partial(tracker.log, renamed, step=int(metrics["step"])))

    def keep(self, responses: Sequence[ValuedResponse]) -> None:
        """Hands on responses token by token, where a tracker has tables."""
        if not responses:
            return
        columns, rows = _as_table(responses)
        for name, tracker in [*self._begun.items()]:
            if hasattr(tracker, "log_table"):
                table = partial(tracker.log_table, columns=columns, data=rows)
                self._attempt(name, partial(table, "valued_tokens", step=responses[0].step))

    def finish(self) -> None:
        """Ends the run with each of them."""
        for name, tracker in [*self._begun.items()]:
            self._attempt(name, tracker.finish)

    def _begin(self, name: str, known: dict[str, str]) -> None:
        """Starts one. What it calls the run is put into `known`."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        _let_accelerate_log()
        kind = KINDS[name]
        begin = Beginning(
            logging=self._config.logging,
            name=self._config.logging.name or self._folder.path.name,
            folder=self._folder,
            first_line=self._first_line,
            known=known.get(name),
        )
        tracker = LOGGER_TYPE_TO_CLASS[name](**kind.arguments(begin))
        tracker.main_process_only = False  # this is the only process that has it
        tracker.start()
        self._begun[name] = tracker
        called = kind.known_as(tracker)
        if called is not None:
            known[name] = called
        values = self._config.model_dump(mode="json")
        if kind.takes_sections:
            tracker.store_init_configuration(values)
        elif not self._first_line or (begin.known is None and called is not None):
            tracker.store_init_configuration(
                {key: _scalar(value) for key, value in flat(values).items()}
            )
        if kind.takes_text:
            tracker.log({"metrics": as_markdown()}, step=begin.first_line)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._begun.pop(name, None)
            self._say(
                f"warning: {name} gets no more of this run, whose numbers are in "
                f"{self._folder.metrics}: {type(error).__name__}: {error}"
            )


def _let_accelerate_log() -> None:
    """Its classes write to a log that wants to know which of several processes it is in.

    It is told of one alone: told of all ranks, it would form process groups and choose devices by
    the launcher's variables, and set the number of threads.
    """
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    with patch_environment(local_rank=-1, pmi_size=1):
        PartialState(cpu=True)


def _known(folder: RunFolder) -> dict[str, str]:
    """What trackers call the run of this folder."""
    try:
        known: dict[str, str] = json.loads(folder.trackers.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _as_table(responses: Sequence[ValuedResponse]) -> tuple[list[str], list[list[Any]]]:
    """Column names, and a row for each token."""
    names = list(dict.fromkeys(name for each in responses for name in each.columns))
    rows = []
    for response in responses:
        numbers: Mapping[str, Sequence[float]] = response.columns
        for place, token in enumerate(response.tokens):
            own = [numbers[name][place] if name in numbers else None for name in names]
            weight = response.weights[place]
            rows.append([response.where, response.branch, place, token, weight, *own])
    return ["row", "branch", "place", "token", "weight", *names], rows
