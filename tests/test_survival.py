"""Runs that are killed, asked to stop, moved to other numbers of ranks, or find their checkpoints
damaged."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from alphatoken.checkpoints import files as checkpoint_files
from alphatoken.checkpoints.best import Best
from alphatoken.checkpoints.export import export_checkpoint
from alphatoken.checkpoints.files import obsolete
from alphatoken.checkpoints.folder import RunFolder, step_folders
from alphatoken.checkpoints.resuming import find_checkpoint, open_run_folder
from alphatoken.checkpoints.saving import Checkpoints, TrainingState
from alphatoken.checkpoints.universal import universal_checkpoint
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.models.loading import name_attention
from alphatoken.training.stopping import StopRequest, WindowDroppedError
from alphatoken.training.watchdog import Watchdog, flight_record
from alphatoken.util.files import file_sha256
from tests.cases import MOMENTS, trainer_of
from tests.ranks import ROOT, run_program, run_ranks
from tests.runs import changed, metrics_of

SEED = 20260601
MODES = list(itertools.product(("float32", "bfloat16"), ("sft", "preference")))
TIMING = ("seconds", "tokens_per_second", "mfu", "peak")


def run_of(
    mode: tuple[str, str],
    run_values: dict[str, Any],
    pair_values: dict[str, Any],
    folder: Path,
    **train: Any,
) -> dict[str, Any]:
    """Four steps of three micro-batches on each of two ranks; the third step goes on into the
    second epoch."""
    dtype, kind = mode
    values = changed(
        run_values if kind == "sft" else pair_values,
        model={"dtype": dtype},
        optim={"warmup_ratio": 0.0},
    )
    return changed(
        values, train={"max_steps": 4, "save_every": 1, "output_dir": str(folder), **train}
    )


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in step.items() if not k.startswith(TIMING)} for step in metrics_of(folder)
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto"
    ).state_dict()
    return weights


class Uninterrupted:
    """What each kind of run gives when nothing happens, made when it is first asked for."""

    def __init__(
        self, run_values: dict[str, Any], pair_values: dict[str, Any], folder: Path
    ) -> None:
        self._values, self._folder = (run_values, pair_values), folder
        self._results: dict[tuple[str, str], Any] = {}

    def of(self, mode: tuple[str, str]) -> tuple[Path, list[dict[str, Any]]]:
        """The run's folder and what its ranks recorded."""
        folder = self._folder / "-".join(mode)
        if mode not in self._results:
            values = run_of(mode, *self._values, folder)
            self._results[mode] = run_ranks(
                "recorded_run", 2, self._folder / f"ranks-{folder.name}", values=values
            )
        return folder, self._results[mode]

    def check_killed(self, mode: tuple[str, str], moment: str, rng: random.Random) -> None:
        """Kills a rank at a random passage of a moment, resumes, and compares with the run that was
        left alone."""
        _, recorded = self.of(mode)
        rank = 0 if moment == "publishing" else rng.randrange(2)
        passages = recorded[rank]["calls"][moment]
        number = rng.randint(1, passages)
        name = f"{'-'.join(mode)}-{moment}-{number}-of-{passages}-on-{rank}".replace(" ", "-")
        folder = self._folder / name
        values, kill = run_of(mode, *self._values, folder), (moment, rank, number)
        with pytest.raises(AssertionError, match=f"killed in {moment}"):
            run_ranks(
                "recorded_run", 2, folder.with_name(f"{name}-first"), values=values, kill=kill
            )
        self.check_resumed(mode, folder)

    def check_resumed(self, mode: tuple[str, str], folder: Path) -> None:
        """Resumes a run and compares it with the one that was left alone."""
        (straight, recorded), name = self.of(mode), folder.name
        values = run_of(mode, *self._values, folder, resume="auto")
        resumed = run_ranks("recorded_run", 2, folder.with_name(f"{name}-again"), values=values)
        assert comparable(folder) == comparable(straight), name
        found = re.search(
            r"continuing after step (\d+)",
            (folder.with_name(f"{name}-again") / "rank-0.log").read_text(),
        )
        done_again = set(
            range(int(found[1]) if found else 0, 4)
        )  # none, if only the export was missing
        for one, other in zip(recorded, resumed, strict=True):
            assert {step for step, _ in other["kept"]} == done_again, name
            for key, kept in other["kept"].items():
                assert torch.equal(kept, one["kept"][key]), f"{name}: other tokens of {key}"
        expected, weights = weights_of(straight / "export"), weights_of(folder / "export")
        assert all(torch.equal(weights[key], weight) for key, weight in expected.items()), name
        assert not list(folder.glob("checkpoints/*.partial"))

    def check_dropped(self, mode: tuple[str, str]) -> None:
        """Asks one rank to stop in the middle of the third step, which has no time to finish."""
        self.of(mode)
        folder = self._folder / "dropped"
        values = run_of(mode, *self._values, folder, save_every=None, grace_seconds=0.01)
        ranks = folder.with_name("dropped-first")
        run_ranks(
            "recorded_run", 2, ranks, values=values, kill=("scoring", 1, 8), by=signal.SIGTERM
        )
        said = (ranks / "rank-0.log").read_text()
        assert "no time to finish step 3: it will be done again" in said
        assert "stopped after step 2, which is saved" in said
        self.check_resumed(mode, folder)


@pytest.fixture
def uninterrupted(
    run_values: dict[str, Any], pair_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> Uninterrupted:
    """Supervised runs read a Fisher; preference runs estimate theirs, and are killed there too."""
    given = changed(run_values, valuation={"fisher": str(tiny_fisher)})
    return Uninterrupted(given, pair_values, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(
    uninterrupted: Uninterrupted,
) -> None:
    """At a random passage of every kind of moment, in {float32, bfloat16} x {SFT, preference} by
    turns; all of them in each is for `make test-long`."""
    rng = random.Random(SEED)
    moments = rng.sample(sorted(MOMENTS), len(MOMENTS))
    for mode, moment in zip(itertools.cycle(MODES), moments, strict=False):
        uninterrupted.check_killed(mode, moment, rng)


@pytest.mark.slow
def test_a_step_without_time_is_dropped_and_done_again(uninterrupted: Uninterrupted) -> None:
    uninterrupted.check_dropped(("float32", "preference"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_moment_in_every_mode(uninterrupted: Uninterrupted) -> None:
    for number, (mode, moment) in enumerate(itertools.product(MODES, MOMENTS)):
        uninterrupted.check_killed(mode, moment, random.Random(SEED + number))
        print(f"{' '.join(mode)}, killed in {moment}: as if nothing had happened", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moves"), [("sft", [(2, 1), (2, 3)]), ("preference", [(1, 2)])])
def test_a_run_goes_on_with_another_number_of_ranks(
    kind: str,
    moves: list[tuple[int, int]],
    run_values: dict[str, Any],
    pair_values: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Two steps on some ranks, then ten more on others: the same rows, losses to 1e-5.

    At learning rates of 1e-3, as elsewhere in these tests, rounding alone grows beyond that within
    seven steps.
    """
    values = changed(run_values if kind == "sft" else pair_values, optim={"lr": 1e-4})
    values = changed(values, train={"max_steps": 12, "eval_every": 4})
    whole = changed(values, train={"output_dir": str(tmp_path / "whole")})
    run_ranks("run_trainers", 2, tmp_path / "ranks-whole", configs={"": whole})
    expected = metrics_of(tmp_path / "whole")
    for before, after in moves:
        name = f"{before}-{after}"
        folder = tmp_path / name
        first = changed(values, train={"output_dir": str(folder), "save_every": 2})
        with pytest.raises(AssertionError, match="killed in save 2"):
            run_ranks(
                "run_trainers",
                before,
                tmp_path / f"{name}-a",
                configs={"": first},
                killed_in_save=2,
            )
        again = changed(first, train={"resume": "auto", "save_every": None, "keep_last": 1})
        (messages, *_) = run_ranks(
            "run_trainers", after, tmp_path / f"{name}-b", configs={"": again}
        )
        assert messages == {"": ""}
        log = (tmp_path / f"{name}-b" / "rank-0.log").read_text()
        assert f"was written by {before} ranks and converted for {after}" in log
        assert "continuing after step 2" in log
        found = metrics_of(folder)
        assert [step["step"] for step in found] == [step["step"] for step in expected]
        for one, other in zip(expected, found, strict=True):
            keys = {
                "loss_kept",
                "loss_response",
                "eval_loss",
                "rewards_margin",
                "kept_tokens",
                "response_tokens",
                "lr",
            }
            for key in one.keys() & keys:
                assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (
                    f"{name}: {key}, step {one['step']}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_other_stages_go_on_with_another_number_of_ranks(
    stage: int, run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    values = changed(
        run_values,
        valuation={"fisher": str(tiny_fisher)},
        deepspeed={"config": {"zero_optimization": {"stage": stage}}},
        optim={"lr": 1e-4},
    )
    whole = changed(values, train={"max_steps": 4, "output_dir": str(tmp_path / "whole")})
    first = changed(whole, train={"output_dir": str(tmp_path / "moved"), "save_every": 2})
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks-whole", configs={"": whole})
    assert messages == {"": ""}
    with pytest.raises(AssertionError, match="killed in save 2"):
        run_ranks(
            "run_trainers", 2, tmp_path / "ranks-first", configs={"": first}, killed_in_save=2
        )
    again = changed(first, train={"resume": "auto"})
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "ranks-again", configs={"": again})
    assert messages == {"": ""}
    for one, other in zip(
        metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "moved"), strict=True
    ):
        for key in one.keys() & {"loss_kept", "eval_loss", "lr", "drift_norm"}:
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), (
                f"{key}, step {one['step']}"
            )


@pytest.mark.slow
def test_what_a_continued_run_needs_is_checked(run_values: dict[str, Any], tmp_path: Path) -> None:
    """Changed rows under the same path, an optimizer that is to change, and a run that was finished
    before."""
    file = tmp_path / "train.jsonl"
    shutil.copy(run_values["data"]["train"], file)
    values = changed(
        run_values,
        data={"train": str(file)},
        valuation={"enabled": False},
        optim={"warmup_ratio": 0.0},
    )
    first = changed(
        values, train={"max_steps": 2, "save_every": 2, "output_dir": str(tmp_path / "run")}
    )
    again = changed(first, train={"resume": "auto"})
    slower = changed(
        again,
        train={"max_steps": 3, "resume_allow": ["optim.*", "train.max_steps"]},
        optim={"lr": 1e-9},
    )
    (messages,) = run_ranks(
        "run_trainers", 1, tmp_path / "ranks", configs={"1": first, "2": again, "3": slower}
    )
    assert messages["1"] == messages["2"] == "", "a finished run is only exported again"
    assert messages["3"] == "", messages
    assert metrics_of(tmp_path / "run")[-1]["lr"] <= 1e-9
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:25]))
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "again", configs={"": slower})
    assert "data.train: the rows of data.train changed" in messages[""]


@pytest.mark.slow
def test_a_stop_between_refreshes_waits_for_the_next_one(
    run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    """Held-out signals are not part of a checkpoint: with refresh_every=2 a run can only go on from
    even steps."""
    train = {"max_steps": 6, "output_dir": str(tmp_path / "run")}
    values = changed(
        run_values, valuation={"refresh_every": 2, "fisher": str(tiny_fisher)}, train=train
    )
    kill = ("scoring", 1, 8)  # in the third step
    run_ranks("recorded_run", 2, tmp_path / "first", values=values, kill=kill, by=signal.SIGUSR1)
    assert "stopped after step 4, which is saved" in (tmp_path / "first" / "rank-0.log").read_text()
    run_ranks(
        "recorded_run", 2, tmp_path / "again", values=changed(values, train={"resume": "auto"})
    )
    assert [step["step"] for step in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_that_ended_between_two_refreshes_cannot_be_made_longer(
    run_values: dict[str, Any],
) -> None:
    """The checkpoint of its last step has no held-out signals for the one after it."""
    values = changed(
        run_values,
        valuation={"refresh_every": 2, "stability_weight": 0.0},
        train={"max_steps": 3, "save_every": 2},
    )
    trainer_of(values).train()
    longer = {"max_steps": 5, "resume": "auto", "resume_allow": ["train.max_steps"]}
    with pytest.raises(UserError, match=r"lies between two refreshes .* not from 3\. Name an"):
        trainer_of(changed(values, train=longer))
    once = {**longer, "resume_allow": ["train.max_steps", "valuation.refresh_every"]}
    trainer_of(changed(values, train=once, valuation={"refresh_every": 1}))


def test_checkpoints_beyond_the_newest_are_set_aside(tmp_path: Path) -> None:
    for step in (10, 20, 22, 30):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "complete.json").write_text("{}")
    (tmp_path / "step-20" / "complete.json").unlink()  # damaged
    (tmp_path / "step-10-universal").mkdir()
    checkpoint_files.tidy(tmp_path, saved=22, keep_last=1, keep_every=None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-20",
        "step-22",
        "step-30.abandoned",
    }


def test_a_converted_checkpoint_is_of_the_save_it_was_made_from(tmp_path: Path) -> None:
    """Another save of the same step, by as many ranks under the same configuration, differs in its
    files alone."""
    checkpoint, converted = tmp_path / "step-8", tmp_path / "step-8-universal"

    def saved(content: str) -> None:
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "weights.pt").write_text(content)
        files = checkpoint_files.described_files(checkpoint, [checkpoint / "weights.pt"], 1)
        description = {"format_version": checkpoint_files.FORMAT_VERSION, "step": 8}
        checkpoint_files.write_description(checkpoint, {**description, "files": files})

    saved("first")
    converted.mkdir()
    source = checkpoint_files.source_of(checkpoint)
    checkpoint_files.write_description(converted, {**source, "files": {}})
    checkpoint_files.tidy(tmp_path, saved=8, keep_last=None, keep_every=None)
    assert checkpoint_files.is_form_of(converted, checkpoint)
    saved("again")
    assert not checkpoint_files.is_form_of(converted, checkpoint)
    checkpoint_files.tidy(tmp_path, saved=8, keep_last=None, keep_every=None)
    assert not converted.exists()
    # One that does not tell the files, of before, is made again.
    del source["made_from"]
    converted.mkdir()
    checkpoint_files.write_description(converted, {**source, "files": {}})
    assert not checkpoint_files.is_form_of(converted, checkpoint)


@pytest.fixture(scope="module")
def damaged_run(
    tiny_model: Path, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """The configuration of a run with two checkpoints, to be resumed."""
    folder = tmp_path_factory.mktemp("damaged")
    values = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "data": {**tiny_data, "cache_dir": str(folder / "cache")},
        "valuation": {"enabled": False},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 2,
            "output_dir": str(folder / "run"),
        },
    }
    values = changed(values, train={"save_every": 1})
    run_ranks("run_trainers", 2, folder / "ranks", configs={"": values})
    return validate(RunConfig, changed(values, train={"resume": "auto"}), "of the test")


@pytest.mark.slow
def test_no_damage_to_a_checkpoint_is_accepted(damaged_run: RunConfig) -> None:
    """100 random files of the newest checkpoint cut, changed in one bit, or deleted: the one before
    is used."""
    newest = damaged_run.train.output_dir / "checkpoints" / "step-2"
    rng = random.Random(SEED)
    for number in range(100):
        file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = file.read_bytes()
        place = rng.randrange(len(content))
        match rng.choice(("cut", "flip", "delete")):
            case "cut":
                file.write_bytes(content[:place])
            case "flip":
                flipped = bytearray(content)
                flipped[place] ^= 1 << rng.randrange(8)
                file.write_bytes(flipped)
            case "delete":
                file.unlink()
        found = find_checkpoint(damaged_run, 2)
        assert found is not None, number
        assert found.step == 1, f"corruption {number} of {file.name} was accepted"
        warnings = [note.text for note in found.notes if note.severity == "warning"]
        assert any(str(newest) in text and str(file) in text for text in warnings), found.notes
        file.write_bytes(content)
    found = find_checkpoint(damaged_run, 2)
    assert found is not None
    assert found.step == 2
    for step in (1, 2):
        (newest.with_name(f"step-{step}") / "complete.json").rename(
            newest.with_name(f"{step}.json")
        )
    with pytest.raises(
        UserError, match=r"no usable checkpoint, but some that are not; remove them to start anew"
    ):
        find_checkpoint(damaged_run, 2)
    for step in (1, 2):
        newest.with_name(f"{step}.json").rename(newest.with_name(f"step-{step}") / "complete.json")


def test_files_of_a_checkpoint_are_hashed_at_once_and_the_first_wrong_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.bin" for number in range(4)]
    for name in names:
        (tmp_path / name).write_text(name)
    files = checkpoint_files.described_files(tmp_path, [tmp_path / name for name in names], 2)
    description = {"format_version": checkpoint_files.FORMAT_VERSION, "world_size": 1}
    checkpoint_files.write_description(tmp_path, {**description, "files": files})
    expected = file_sha256(tmp_path / "1.bin")
    met, digest = threading.Barrier(2), file_sha256

    def hash_two_at_once(file: Path) -> str:
        met.wait(timeout=20)
        return digest(file)

    monkeypatch.setattr(checkpoint_files, "workers", lambda sharing=1: 2)
    monkeypatch.setattr(checkpoint_files, "file_sha256", hash_two_at_once)
    assert checkpoint_files.damage(tmp_path) is None
    monkeypatch.setattr(checkpoint_files, "file_sha256", digest)
    (tmp_path / "3.bin").unlink()
    (tmp_path / "1.bin").write_text("1.bim")
    found = checkpoint_files.damage(tmp_path)
    assert found == (
        f"{tmp_path / '1.bin'} does not have the content that was saved: its SHA-256 is "
        f"{file_sha256(tmp_path / '1.bin')} instead of {expected}"
    )


@pytest.mark.slow
def test_a_killed_conversion_starts_clean_with_several_workers(
    damaged_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = damaged_run.train.output_dir / "checkpoints" / "step-1"
    target = checkpoint.with_name("step-1-universal")
    killed = target.with_name(f"{target.name}.partial")
    (killed / "zero").mkdir(parents=True)
    commands: list[list[str]] = []
    start = subprocess.run

    def run(command: list[str], **named: Any) -> Any:
        commands.append(command)
        return start(command, **named)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("alphatoken.checkpoints.universal.workers", lambda sharing=1: 2)
    assert universal_checkpoint(checkpoint) == target
    assert checkpoint_files.damage(target) is None
    assert not killed.exists()
    assert universal_checkpoint(checkpoint) == target
    (command,) = commands
    assert command[-4:] == ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    shutil.rmtree(target)


@pytest.mark.slow
def test_what_changed_since_the_checkpoint_is_listed(
    damaged_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    values = changed(
        name_attention(damaged_run).model_dump(mode="json"),
        optim={"lr": 1e-4},
        train={"eval_every": 7, "seed": 5},
    )

    def opened(*allowed: str) -> list[str]:
        config = validate(
            RunConfig, changed(values, train={"resume_allow": list(allowed)}), "of the test"
        )
        _, found = open_run_folder(config)
        assert found is not None
        return [str(note) for note in found.notes]

    with pytest.raises(UserError) as error:
        opened("train.seed")
    assert "optim.lr: was 2e-05, is 0.0001" in str(error.value)
    assert "train.seed" not in str(error.value).split(":\n")[1]
    notes = opened("train.seed", "optim.*")
    assert (
        "changed since step-2, as train.resume_allow says: optim.lr: was 2e-05, is 0.0001" in notes
    )
    assert "changed since step-2, as train.resume_allow says: train.seed: was 0, is 5" in notes
    assert "changed since step-2: train.eval_every: was None, is 7" in notes
    assert len(notes) == 3


def test_a_checkpoint_leaves_the_options_of_the_optimizer_as_configured() -> None:
    """Whatever was loaded: a decay of zero that is to be one, another rate, in a schedule that is
    half over."""

    def engine(lr: float, decay: float) -> SimpleNamespace:
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [
            {"params": [weights[0]], "weight_decay": decay},
            {"params": [weights[1]], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        return SimpleNamespace(
            optimizer=optimizer, lr_scheduler=get_linear_schedule_with_warmup(optimizer, 0, 10)
        )

    before, now = engine(1.0, 0.0), engine(0.1, 0.5)
    for _ in range(5):
        before.optimizer.step()
        before.lr_scheduler.step()
    options = zero3.optimizer_options(now)
    now.optimizer.load_state_dict(before.optimizer.state_dict())
    now.lr_scheduler.load_state_dict(before.lr_scheduler.state_dict())
    zero3.set_optimizer_options(now, options)
    groups = now.optimizer.param_groups
    assert (
        [group["lr"] for group in groups]
        == now.lr_scheduler.get_last_lr()
        == pytest.approx([0.05, 0.05])
    )
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    now.optimizer.step()
    now.lr_scheduler.step()
    assert groups[0]["lr"] == pytest.approx(0.04)


def test_a_checkpoint_saved_for_being_best_goes_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """Also where all that are due are kept, and after a resume. Of (step, best step) as saved."""
    loaded = {"scales": None, "inputs": {}, "best": Best("eval_loss", 1.0, 210).as_json()}
    monkeypatch.setattr(zero3, "save_shards", lambda *_: ([], None))
    monkeypatch.setattr(zero3, "load_shards", lambda *_: {"alphatoken": loaded})
    for name in ("optimizer_options", "separate_step_counts", "set_optimizer_options"):
        monkeypatch.setattr(zero3, name, lambda *_: None)
    values = {
        "model": {"name_or_path": str(tiny_model)},
        "data": {"train": "t.jsonl", "validation": "v.jsonl", "eval": "e.jsonl"},
        "train": {
            "output_dir": str(tmp_path),
            "save_every": 100,
            "eval_every": 10,
            "keep_best": "eval_loss",
        },
    }
    config, folder = validate(RunConfig, values, "of the test"), RunFolder(tmp_path)

    def state(best: int) -> TrainingState:
        return TrainingState(scales=None, inputs={}, best=Best("eval_loss", 1.0, best), random=None)

    def kept() -> list[int]:
        return sorted(step_folders(folder.checkpoints))

    saves = Checkpoints(folder=folder, engine=None, config=config, needed=0)
    for step, best, left in (
        (100, 100, [100]),
        (110, 110, [100, 110]),
        (120, 120, [100, 120]),
        (200, 120, [100, 120, 200]),
        (210, 210, [100, 200, 210]),
    ):
        saves.save(step, state(best))
        assert kept() == left
    again = Checkpoints(folder=folder, engine=None, config=config, needed=0)
    assert again.load(folder.checkpoints / "step-210", 210).owed is None, "as in older checkpoints"
    again.save(220, state(220))
    assert kept() == [100, 200, 220]


def test_which_checkpoints_may_go() -> None:
    steps = [10, 20, 30, 40, 50]
    assert obsolete(steps, None, None) == []
    assert obsolete(steps, 2, None) == [30, 20, 10]
    assert obsolete(steps, 2, 20) == [30, 10]
    assert obsolete(steps, 9, None) == []


@pytest.mark.slow
def test_old_checkpoints_are_removed_when_newer_ones_are_whole(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    train = {
        "max_steps": 6,
        "save_every": 1,
        "keep_last": 2,
        "keep_every": 3,
        "output_dir": str(tmp_path / "run"),
    }
    values = changed(run_values, train=train, valuation={"enabled": False})
    run_ranks("run_trainers", 1, tmp_path / "ranks", configs={"": values})
    assert sorted(step_folders(tmp_path / "run" / "checkpoints")) == [3, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["space", "refused", "small disk"])
def test_a_full_disk_stops_the_run_and_leaves_older_checkpoints(
    way: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    """There is too little space; or the disk says so while files are written; or it really is that
    small."""
    values = changed(
        run_values,
        train={"max_steps": 3, "save_every": 1, "output_dir": str(tmp_path / "disk" / "run")},
        valuation={"enabled": False},
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    if way == "small disk":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        (messages, *_) = run_ranks(
            "run_trainers", 2, tmp_path / "ranks", configs={"": values}, disk=way
        )
        expected = (
            "GiB free, but a checkpoint takes" if way == "space" else "cannot write checkpoint"
        )
        assert expected in messages[""]
        assert "step-2" in messages[""] or way == "space"
        checkpoints = disk / "run" / "checkpoints"
        assert list(step_folders(checkpoints)) == [1]
        assert checkpoint_files.damage(checkpoints / "step-1") is None
        assert (checkpoints / "latest").read_text() == "step-1"
        assert not list(checkpoints.glob("*.partial"))
    finally:
        if way == "small disk":
            subprocess.run(["umount", str(disk)], check=True)


def test_a_stop_is_remembered_and_short_grace_drops_the_window() -> None:
    with StopRequest(torch.device("cpu"), grace=None) as stop:
        assert not stop.is_agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_agreed()
        stop.took("micro-batch", 1e9)
        stop.drop_if_short(9, evaluates=True)  # without a grace period a step is always finished
    with StopRequest(torch.device("cpu"), grace=60.0) as stop:
        stop.took("micro-batch", 5.0)
        stop.drop_if_short(99, evaluates=True)  # nobody asked
        os.kill(os.getpid(), signal.SIGTERM)
        # 25 s and, as nothing is known of saves, half of the grace
        stop.drop_if_short(5, evaluates=False)
        with pytest.raises(WindowDroppedError):
            stop.drop_if_short(7, evaluates=False)
        stop.took("save", 10.0)
        stop.drop_if_short(7, evaluates=False)
        stop.drop_if_short(3, evaluates=True)  # the same of evaluations
        with pytest.raises(WindowDroppedError):
            stop.drop_if_short(5, evaluates=True)
        stop.took("evaluation", 20.0)
        stop.drop_if_short(7, evaluates=False)
        with pytest.raises(WindowDroppedError):
            stop.drop_if_short(7, evaluates=True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def started(values: dict[str, Any], file: Path, *overrides: str) -> subprocess.Popen[str]:
    """The recipe on two CPU ranks, in the background."""
    file.write_text(yaml.safe_dump(values))
    command = ["launch/local.sh", "recipes/sft.py", "--config", str(file), *overrides]
    environment = {**os.environ, "RANKS": "2", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(file: Path) -> list[int]:
    """Process ids of the ranks that run this configuration, in rank order."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words, variables = (
                (folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ")
            )
        except OSError:
            continue
        ranks = [
            int(each.removeprefix(b"RANK=")) for each in variables if each.startswith(b"RANK=")
        ]
        if ranks and str(file).encode() in words:
            found[ranks[0]] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_ends_the_run_after_its_step_and_a_standstill_is_named(
    run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to one rank; then, in the continued run, one rank stops answering."""
    folder, file = tmp_path / "run", tmp_path / "config.yaml"
    train = {"max_steps": 400, "output_dir": str(folder), "watchdog_seconds": 2.0}
    values = changed(run_values, valuation={"fisher": str(tiny_fisher)}, train=train)

    def steps() -> int:
        return len(metrics_of(folder)) - 1 if (folder / "metrics.jsonl").exists() else 0

    run = started(values, file)
    wait_for(lambda: steps() >= 2)
    os.kill(ranks_of(file)[1], signal.SIGUSR1)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    last = steps()
    assert (
        f"stopped after step {last}, which is saved; continue with the same command and "
        "train.resume=auto" in output
    )
    assert list(step_folders(folder / "checkpoints")) == [last]
    assert not (folder / "export").exists()

    run = started(values, file, "train.resume=auto")
    try:
        wait_for(lambda: steps() >= last + 2)
        stopped = ranks_of(file)[1]
        os.kill(stopped, signal.SIGSTOP)
        assert run.stdout is not None
        lines: list[str] = []
        # Where other work delays both ranks, a warning of another standstill may come first.
        while not any(line.startswith("  rank 1 does not answer") for line in lines):
            lines.append(run.stdout.readline())
        shown = "".join(lines)
        assert f"continuing after step {last}" in shown
        assert "warning: no step has moved for 2 s; held up by rank 1:" in shown
        assert "  rank 0 waits in " in shown
        assert "  rank 1 does not answer (stopped, gone or cut off); last seen in step " in shown, (
            shown
        )
        wait_for((folder / "flight-recorder" / "rank_0").exists)
        # Our own file, of this test.
        record = pickle.loads((folder / "flight-recorder" / "rank_0").read_bytes())
        assert any("all_reduce" in entry["profiling_name"] for entry in record["entries"])
        assert (
            f"  the last messages of each rank, by torch's recorder: {folder / 'flight-recorder'}"
            in "".join([*lines, run.stdout.readline()])
        )
    finally:
        for process in ranks_of(file):
            os.kill(process, signal.SIGKILL)
        run.communicate(timeout=120)


def test_each_backend_has_a_recorder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch names them (2.13)."""
    kept = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for backend, name in kept.items():
        record = backend.encode()
        module = "torch._C._distributed_c10d"
        monkeypatch.setattr(f"{module}.{name}", lambda record=record: record, raising=False)
    for backend in kept:
        monkeypatch.setattr("torch.distributed.get_backend", lambda backend=backend: backend)
        assert flight_record() == backend.encode()


def test_the_watchdog_says_nothing_while_things_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(tmp_path / "beats", 0, 1, seconds=0.4) as watchdog:
        for number in range(8):
            watchdog.moved(f"step {number}")
            time.sleep(0.1)
        assert capsys.readouterr().err == ""
        wait_for(lambda: (tmp_path / "beats").exists() and watchdog.has_spoken, seconds=5)
        shown = capsys.readouterr().err
    assert "no step has moved for 0 s; held up by rank 0" in shown
    assert "rank 0 is busy in step 7" in shown
    assert not list((tmp_path / "beats").glob("*.json"))


@pytest.mark.slow
def test_an_export_of_shards_is_the_engines_model(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run on 2 ranks that was interrupted and continued: weights and logits as in the engine's
    own export."""
    monkeypatch.setattr("alphatoken.checkpoints.weight_files.SHARD_BYTES", 50_000)
    configs = {}
    kinds: dict[str, dict[str, Any]] = {
        "zero-3": {},
        "bf16": {"model": {"dtype": "bfloat16"}},
        "zero-2": {"deepspeed": {"config": {"zero_optimization": {"stage": 2}}}},
        "zero-0": {"deepspeed": {"config": {"zero_optimization": {"stage": 0}}}},
    }
    for name, sections in kinds.items():
        values = changed(run_values, valuation={"enabled": False}, **sections)
        train = {"max_steps": 1, "save_every": 1, "output_dir": str(tmp_path / name)}
        configs[name] = changed(values, train=train)
        configs[f"{name}, continued"] = changed(
            configs[name], train={"max_steps": 3, "resume": "auto"}
        )
        configs[f"{name}, continued"]["train"]["resume_allow"] = ["train.max_steps"]
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    assert not any(messages.values()), messages
    for name in kinds:
        run, target = tmp_path / name, tmp_path / f"{name}-exported"
        done = export_checkpoint(run, target)
        assert (done.step, done.files > 2) == (3, True)
        assert (target / "model.safetensors.index.json").exists()
        engine, ours = weights_of(run / "export"), weights_of(target)
        assert engine.keys() == ours.keys()
        assert all(torch.equal(weight, engine[key]) for key, weight in ours.items()), name
        tokenizer = AutoTokenizer.from_pretrained(target)
        ids = tokenizer("Hello there", return_tensors="pt").input_ids
        logits = [
            AutoModelForCausalLM.from_pretrained(each, dtype="auto")(ids).logits
            for each in (target, run / "export")
        ]
        assert torch.equal(*logits)
        card = (target / "README.md").read_text()
        assert "3 optimizer steps of supervised fine-tuning" in card
        assert f"`{run_values['data']['train']}`, 30 rows" in card
        assert (target / "generation_config.json").exists()
    with pytest.raises(UserError, match="exists; name a new folder"):
        export_checkpoint(tmp_path / "zero-3", tmp_path / "zero-3-exported")
    with pytest.raises(UserError, match="has no checkpoint of step 7, but of 1, 2, 3"):
        export_checkpoint(tmp_path / "zero-3", tmp_path / "new", step=7)
    with pytest.raises(UserError, match="no adapters to merge"):
        export_checkpoint(tmp_path / "zero-3", tmp_path / "new", merge=True)
    with pytest.raises(UserError, match=r"has no checkpoint; was train.save_every set"):
        export_checkpoint(tmp_path, tmp_path / "new")


@pytest.mark.slow
def test_adapters_are_exported_as_such_or_merged(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    train = {"max_steps": 2, "save_every": 2, "output_dir": str(tmp_path / "run")}
    optim = {"lr": 1e-2, "warmup_ratio": 0.0}
    base_folder = tmp_path / "base"
    shutil.copytree(run_values["model"]["name_or_path"], base_folder)
    values = changed(
        run_values,
        model={"name_or_path": str(base_folder), "lora": {"r": 4}},
        valuation={"enabled": False},
        train=train,
        optim=optim,
    )
    run_ranks("run_trainers", 2, tmp_path / "ranks", configs={"": values})
    for arguments in ([str(tmp_path / "adapters")], [str(tmp_path / "merged"), "--merge"]):
        (finished,) = run_program("-m", "alphatoken", "export", tmp_path / "run", *arguments)
        assert finished.returncode == 0, finished.stderr
        assert f"{arguments[0]}: " in finished.stdout
    base = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"])
    engine, ours = (
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"]), str(folder)
        )
        for folder in (tmp_path / "run" / "export", tmp_path / "adapters")
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        "Hello there", return_tensors="pt"
    ).input_ids
    expected = engine(ids).logits
    assert not torch.allclose(expected, base(ids).logits, atol=1e-3)
    assert torch.equal(ours(ids).logits, expected)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert not list((tmp_path / "merged").glob("adapter_*"))
    assert "LoRA adapters of" in (tmp_path / "adapters" / "README.md").read_text()
    base_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"model.name_or_path of .*run.*base"):
        export_checkpoint(tmp_path / "run", tmp_path / "again", merge=True)


@pytest.mark.slow
def test_an_export_that_fails_ends_every_rank_and_leaves_nothing_that_looks_whole(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """A torn export cannot be taken for a whole one; the run goes on from its checkpoint when there
    is room again."""
    folder = tmp_path / "run"
    values = changed(
        run_values,
        train={"max_steps": 2, "save_every": 1, "output_dir": str(folder), "resume": "auto"},
        valuation={"enabled": False},
    )
    first, others = run_ranks(
        "run_trainers", 2, tmp_path / "full", configs={"": values}, disk="export"
    )
    assert f"cannot write the export {folder / 'export'}: " in first[""]
    assert others[""].startswith("rank 0: cannot write the export")
    assert not list(folder.glob("export*"))
    # What a killed one leaves behind is removed, and an older export replaced.
    (folder / "export.partial").mkdir()
    (folder / "export.partial" / "model.safetensors").write_text("torn")
    (folder / "export").mkdir()
    (folder / "export" / "of_old").write_text("older")
    messages = run_ranks("run_trainers", 2, tmp_path / "again", configs={"": values})
    assert messages == [{"": ""}, {"": ""}]
    assert [path.name for path in folder.glob("export*")] == ["export"]
    assert not (folder / "export" / "of_old").exists()
    assert AutoModelForCausalLM.from_pretrained(folder / "export")
