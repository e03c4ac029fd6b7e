"""Runs a study and shows what came out: every arm in every condition with every seed.

    python -m benchmarks.study run STUDY.yaml [--data DIR] [--together 2]
    python -m benchmarks.study table STUDY.yaml

A study is one YAML file (`benchmarks/studies/`; `studies.settings` explains its keys). Each run is
a process of its own in a folder of its own and ends by writing `result.json`. All arms of a seed
see the same corrupted rows in the same order for as many steps.

`run` adds each finished run to the study's JSON. A run that has a `result.json`, or that the JSON
has with the same settings, is not done again: a study that was stopped goes on with the same
command, also where only its JSON is left. `table` makes the Markdown table and the picture (.svg,
beside the JSON) from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alphatoken.config.file import load_config
from alphatoken.errors import UserError
from benchmarks.measuring import write_result
from benchmarks.studies.job import configuration, reference_job
from benchmarks.studies.settings import Condition, Job, StudySettings, job_of
from benchmarks.studies.tables import markdown, picture

RESULTS = Path("benchmarks/results")
LOG_LINES = 15


@dataclass(frozen=True)
class Place:
    """A run of the study, and which of its cells it fills."""

    folder: Path
    job: Job
    condition: str
    arm: str
    seeds: tuple[int, ...]
    """Several where training does not matter."""


class Study:
    """The runs of a study in a folder.

    earlier: the study's JSON (`results`) from before; what it has with the same settings is done.
    """

    def __init__(
        self,
        settings: StudySettings,
        folder: Path,
        data: Path | None,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self._folder = folder / settings.name
        self._data = data
        self._earlier = earlier
        self._recorded: dict[tuple[str, str, int], dict[str, Any]] = {}
        if earlier is not None:
            before = StudySettings.model_validate(earlier["study"])
            for run in earlier["runs"]:
                condition, arm = run["condition"], run["arm"]
                if before.of_run(condition, arm) == settings.of_run(condition, arm):
                    untrained = settings.arms[arm].kind == "untrained"
                    for seed in settings.seeds if untrained else [run["seed"]]:
                        self._recorded[condition, arm, seed] = {**run, "seed": seed}

    def is_recorded(self, place: Place) -> bool:
        """Whether the study's JSON has a run."""
        return all((place.condition, place.arm, seed) in self._recorded for seed in place.seeds)

    def run(self, together: int, on_finished: Callable[[], None] = lambda: None) -> None:
        """Does every run that is not done, so many at once. Raises UserError where one fails, or
        where the configuration of any would."""
        with tempfile.TemporaryDirectory() as scratch:
            for place in self.places():
                try:
                    configuration(place.job, Path(scratch))
                    if place.job.arm.reference == "held_out":
                        configuration(reference_job(place.job), Path(scratch))
                except UserError as error:
                    raise UserError(f"arm {place.arm!r}: {error}") from None
        if self._recorded:
            print(f"{len(self._recorded)} runs are in the study's JSON and not done again")
        do_all(list(self.tuning()), together, "rates", on_finished)
        do_all(list(self.missing()), together, "runs", on_finished)

    def results(self, command: str) -> dict[str, Any]:
        """The finished runs, as the study's JSON has them."""
        runs = []
        devices, versions = set[str](), dict[str, str]()
        if self._recorded and self._earlier is not None:
            devices, versions = set(self._earlier["devices"]), self._earlier["versions"]
        for place in self.places():
            if self.is_recorded(place):
                runs += [self._recorded[place.condition, place.arm, seed] for seed in place.seeds]
                continue
            result = finished(place)
            if result is None:
                continue
            devices.add(result["device"])
            versions = joined(versions, result["versions"])
            shared = {key: result[key] for key in ("metrics", "seconds")}
            for seed in place.seeds:
                runs.append(
                    {
                        "condition": place.condition,
                        "arm": place.arm,
                        "seed": seed,
                        "rate": place.job.rate,
                        **shared,
                    }
                )
        return {
            "command": command,
            "devices": sorted(devices),
            "versions": versions,
            "study": self.settings.model_dump(mode="json"),
            "runs": runs,
        }

    def missing(self) -> Iterator[Place]:
        """Every run that is reported and that the study's JSON does not have."""
        return (place for place in self.places() if not self.is_recorded(place))

    def places(self) -> Iterator[Place]:
        """Every run that is reported, condition by condition and seed by seed, so that a study cut
        short has whole comparisons."""
        settings = self.settings
        for condition in settings.conditions:
            for arm in settings.arms_in(condition):
                if settings.arms[arm].kind == "untrained":
                    yield self._untrained(condition, arm)
            for seed in settings.seeds:
                for arm in settings.arms_in(condition):
                    if settings.arms[arm].kind != "untrained":
                        yield self._trained(condition, arm, seed)

    def _trained(self, condition: str, arm: str, seed: int) -> Place:
        job = job_of(
            self.settings, condition, arm, seed=seed, purpose="test", data=self._data
        ).model_copy(update={"rate": self._best_rate(condition, arm)})
        folder = self._folder / condition / slug(arm) / f"seed-{seed}"
        return Place(folder, job, condition, arm, (seed,))

    def _untrained(self, condition: str, arm: str) -> Place:
        """The same for all corruptions of the same rows, and all seeds."""
        rows = self.settings.conditions[condition].rows
        job = job_of(
            self.settings, condition, arm, seed=0, purpose="test", data=self._data
        ).model_copy(update={"condition": Condition(rows=rows)})
        folder = self._folder / slug(arm) / rows
        return Place(folder, job, condition, arm, tuple(self.settings.seeds))

    def tuning(self) -> Iterator[Place]:
        """Every run that the learning rate of a missing one is chosen by."""
        cells = dict.fromkeys((place.condition, place.arm) for place in self.missing())
        for condition, arm in cells:
            if self.settings.arms[arm].kind != "untrained":
                for rate in self.settings.rates:
                    yield self._tuning_place(condition, arm, rate)

    def _tuning_place(self, condition: str, arm: str, rate: float) -> Place:
        seed = self.settings.tuning_seed
        job = job_of(
            self.settings, condition, arm, seed=seed, purpose="tuning", data=self._data
        ).model_copy(update={"rate": rate})
        folder = self._folder / condition / slug(arm) / f"rate-{rate:g}"
        return Place(folder, job, condition, arm, (seed,))

    def _best_rate(self, condition: str, arm: str) -> float | None:
        """The rate with the lowest loss of the tuning rows; None where none is to be chosen, or not
        all were tried yet."""
        losses = {}
        for rate in self.settings.rates:
            result = finished(self._tuning_place(condition, arm, rate))
            if result is None:
                return None
            losses[rate] = result["metrics"]["eval_loss"]
        return min(losses, key=lambda rate: losses[rate]) if losses else None


def joined(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """The versions of all packages, both where runs had different ones."""
    both = dict(earlier)
    for name, version in later.items():
        if version not in both.setdefault(name, version).split(", "):
            both[name] += f", {version}"
    return both


def do_all(
    places: Sequence[Place], together: int, what: str, on_finished: Callable[[], None]
) -> None:
    """Does the runs that are not done, in their order. Where one fails, those under way are
    finished and no other is begun."""
    numbers = {place.folder: number for number, place in enumerate(places, start=1)}
    undone = {place.folder: place for place in places if finished(place) is None}
    with ThreadPoolExecutor(together) as pool:
        under_way = [
            pool.submit(do, place, f"{what} {numbers[folder]}/{len(places)}")
            for folder, place in undone.items()
        ]
        try:
            for run in as_completed(under_way):
                run.result()
                on_finished()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def do(place: Place, number: str) -> None:
    """Does a run. Raises UserError with the end of its log where it fails."""
    name = f"{number}  {place.condition} / {place.arm} / {place.folder.name}"
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "job.json").write_text(place.job.model_dump_json(indent=1), encoding="utf-8")
    began = time.perf_counter()
    log = place.folder / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.job", str(place.folder)],
            env={**os.environ, "OMP_NUM_THREADS": str(place.job.threads), "TQDM_DISABLE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    result = finished(place)
    if code or result is None:
        end = log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:]
        raise UserError(f"{name} failed with status {code}; the end of {log}:\n" + "\n".join(end))
    shown = "  ".join(f"{key} {value:.4f}" for key, value in result["metrics"].items())
    print(f"{name}  {time.perf_counter() - began:.0f} s  {shown}", flush=True)


def finished(place: Place) -> dict[str, Any] | None:
    """The result of a run, None where it is not done. Raises UserError where it is of other
    settings."""
    file = place.folder / "result.json"
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    try:
        job = Job.model_validate(result["job"])  # keys that it was written without have defaults
    except ValidationError as error:
        raise UserError(f"{file} is of another version of this program: {error}") from None
    changed = [key for key in Job.model_fields if getattr(job, key) != getattr(place.job, key)]
    if changed:
        raise UserError(
            f"{file} is of other settings ({', '.join(changed)}): remove its folder to do the run "
            "again, or give the study another name"
        )
    return result


def slug(name: str) -> str:
    """A name that a folder can have."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        settings = load_config(StudySettings, options.study, options.overrides)
        file = options.results or RESULTS / f"study_{settings.name}.json"
        if options.command == "run":
            data = None if options.data is None else options.data.resolve()
            earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
            study = Study(settings, options.folder, data, earlier)
            command = "python -m benchmarks.study run " + shlex.join(
                [str(options.study), *options.overrides]
            )

            def record() -> None:
                write_result(study.results(command), file)

            try:
                study.run(options.together, record)
            finally:
                record()
        show(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def show(file: Path) -> None:
    """Prints the table of a study's JSON, and writes table and picture beside it."""
    if not file.exists():
        raise UserError(f"there is no {file}: do the study first (python -m benchmarks.study run)")
    results = json.loads(file.read_text(encoding="utf-8"))
    print(markdown(results))
    file.with_suffix(".svg").write_text(picture(results), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument(
        "overrides", nargs="*", help="key=value of the study's file, for a smaller study"
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets (.jsonl.gz)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/studies"), help="where the runs lie"
    )
    parser.add_argument(
        "--together", type=int, default=1, help="runs at once, each with the study's threads"
    )
    parser.add_argument(
        "--results", type=Path, help="the study's JSON; default: benchmarks/results/study_NAME.json"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
