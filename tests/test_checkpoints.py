"""What a checkpoint lists, who hashes it, what is refused before anything of it is opened, and
whose random state it holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from alphatoken.checkpoints.export import export_checkpoint
from alphatoken.checkpoints.files import (
    DESCRIPTION,
    FORMAT_VERSION,
    check_listing,
    damage,
    described_files,
    missing_files,
    read_description,
    universal_folder,
    write_description,
)
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.checkpoints.resuming import accepted_changes, find_checkpoint
from alphatoken.checkpoints.saving import Checkpoints
from alphatoken.checkpoints.universal import universal_checkpoint
from alphatoken.checkpoints.weight_files import WeightFiles
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.distributed.shard_files import save_tensors
from alphatoken.errors import UserError
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer
from alphatoken.util.files import PartialFolder, file_sha256
from tests.ranks import run_ranks
from tests.runs import changed


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def describe_again(checkpoint: Path, **changes: Any) -> None:
    """Describes the files of a checkpoint as they are now."""
    names = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    names.remove(checkpoint / DESCRIPTION)
    description = read_description(checkpoint)
    files = {"files": described_files(checkpoint, names, 1)}
    write_description(checkpoint, {**description, **files, **changes})


def without_files(checkpoint: Path, *lacking: str) -> None:
    """Leaves files out of a checkpoint and its description."""
    for name in lacking:
        (checkpoint / name).unlink()
    describe_again(checkpoint)


def checkpoint_of(values: dict[str, Any]) -> Path:
    return Path(values["train"]["output_dir"]) / "checkpoints" / "step-1"


def copied(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a run's folder, and its configuration."""
    folder = Path(values["train"]["output_dir"])
    shutil.copytree(folder, folder.with_name(name))
    return changed(values, train={"output_dir": str(folder.with_name(name)), "resume": "auto"})


def test_a_list_without_a_ranks_file_is_told_by_its_name() -> None:
    whole = [
        *(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)),
        *(f"random/{rank:05}-of-00012.safetensors" for rank in range(12)),
        *(f"scorer/slices-{rank:05}-of-00012.safetensors" for rank in range(12)),
        "mp_rank_00_model_states.pt",
    ]
    assert missing_files(whole, 12) == []
    lacking = {
        "bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt",
        "random/00003-of-00012.safetensors",
        "scorer/slices-00000-of-00012.safetensors",
        "scorer/slices-00011-of-00012.safetensors",
    }
    assert set(missing_files(set(whole) - lacking, 12)) == lacking
    assert len(missing_files(whole, 13)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        '"sha256"',
        '{"format_version": 4, "sha256": 5}',
        '{"format_version": {}, "sha256": ""}',
        '{"step": ' + "1" * 5000 + "}",
        "[" * 100_000,
        "\udce9",
    ],
    ids=["list", "number", "null", "text", "hash", "version", "digits", "deep", "latin"],
)
def test_a_description_of_another_shape_is_damage(
    run_values: dict[str, Any], tmp_path: Path, text: str
) -> None:
    """The checkpoint before it is resumed from."""
    values = changed(run_values, train={"output_dir": str(tmp_path / "run"), "resume": "auto"})
    config = validate(RunConfig, values, "of the test")
    older, newest = (tmp_path / "run" / "checkpoints" / name for name in ("step-1", "step-2"))
    for folder in (older, newest):
        folder.mkdir(parents=True)
    description = {"step": 1, "world_size": 1, "config": config.model_dump(mode="json")}
    write_description(older, {"format_version": FORMAT_VERSION, "files": {}, **description})
    (newest / DESCRIPTION).write_text(text, errors="surrogateescape")
    assert str(newest / DESCRIPTION) in (damage(newest) or "")
    found = find_checkpoint(config, 1)
    assert found is not None
    assert found.checkpoint == older
    assert f"warning: not resuming from {newest}: " in str(found.notes[0])
    named = validate(RunConfig, changed(values, train={"resume": str(newest)}), "of the test")
    with pytest.raises(UserError, match=f"cannot resume from {newest}: "):
        find_checkpoint(named, 1)


def test_a_checkpoint_may_be_the_current_folder_and_must_be_one(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resumed(path: str) -> None:
        values = changed(run_values, train={"resume": path})
        find_checkpoint(validate(RunConfig, values, "of the test"), 1)

    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    monkeypatch.chdir(checkpoint)
    for path in (".", "./", "../step-1"):
        with pytest.raises(UserError, match=r"step-1/complete.json cannot be read"):
            resumed(path)
    for path in ("/", "runs/-universal"):
        with pytest.raises(UserError, match=f"train.resume={path} is no checkpoint; name a folder"):
            resumed(path)


def test_a_folder_that_does_not_show_all_files_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "step-1"
    (checkpoint / "random").mkdir(parents=True)
    names = ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "random/00000-of-00001.safetensors"]
    for name in names:
        torch.save({}, checkpoint / name)
    files = described_files(checkpoint, [checkpoint / name for name in names], 1)
    description = {"format_version": FORMAT_VERSION, "world_size": 1, "files": files}
    write_description(checkpoint, description)
    assert damage(checkpoint) is None
    check_listing(checkpoint)
    shown = checkpoint / names[1]
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter([shown]))
    with pytest.raises(UserError, match=f"does not show its file {names[0]}; a shared file system"):
        universal_checkpoint(checkpoint)


def test_slices_of_a_scorer_that_are_listed_and_not_shown_are_not_taken_for_none(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """A file that a shared file system shows late, or has lost; also under the name of the form for
    another number of ranks."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    file = checkpoint / "scorer" / "slices-00000-of-00001.safetensors"
    file.parent.mkdir(parents=True)
    config = validate(RunConfig, run_values, "of the test")
    checkpoints = Checkpoints(
        folder=RunFolder(tmp_path / "run"), engine=None, config=config, needed=0
    )
    places = {"w": {"shape": [2], "start": 0}}
    header = {"alphatoken": json.dumps({"kind": "sums", "tensors": places})}
    save_tensors({"w": torch.ones(2)}, file, header)
    files = described_files(checkpoint, [file], 1)
    description = {"format_version": FORMAT_VERSION, "world_size": 1, "files": files}
    write_description(checkpoint, description)
    hidden = file.parent.rename(tmp_path / "hidden")
    for folder in (checkpoint, universal_folder(checkpoint)):
        with pytest.raises(UserError, match=rf"{file} is listed in .*{DESCRIPTION}, but"):
            checkpoints.scorer_slices(folder)
    hidden.rename(file.parent)
    for folder in (checkpoint, universal_folder(checkpoint)):
        slices = checkpoints.scorer_slices(folder)
        assert slices is not None
        assert slices.header == {"kind": "sums"}
        assert torch.equal(slices["w"], torch.ones(2))
    write_description(checkpoint, {**description, "files": {}})
    assert checkpoints.scorer_slices(checkpoint) is None, "what is not listed is not opened"


def in_version_3(checkpoint: Path, states: list[list[torch.Tensor]]) -> None:
    """Turns a checkpoint into one of before, with all ranks' random states in every rank's file."""
    for file in checkpoint.glob("*model_states.pt"):
        content = torch.load(file, weights_only=True)
        content["alphatoken"]["random"] = states
        torch.save(content, file)
    shutil.rmtree(checkpoint / "random")
    describe_again(checkpoint, format_version=3)


@pytest.mark.slow
def test_ranks_list_hash_and_keep_what_is_their_own(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Two runs, of stages 3 and 2, whose checkpoints are written while nobody can see rank 1's
    files in a folder; resumed as they are, damaged in different ways, and by another number of
    ranks."""
    runs = {
        str(stage): changed(
            run_values,
            deepspeed={"config": {"zero_optimization": {"stage": stage}}},
            valuation={"enabled": False},
            train={"save_every": 1, "output_dir": str(tmp_path / f"stage-{stage}")},
        )
        for stage in (3, 2)
    }
    states = run_ranks("saved_with_late_listings", 2, tmp_path / "saved", configs=runs, late="1")
    listed = {
        name: read_description(checkpoint_of(values))["files"] for name, values in runs.items()
    }
    for name, values in runs.items():
        found = {
            str(path.relative_to(checkpoint_of(values)))
            for path in checkpoint_of(values).rglob("*")
            if path.is_file()
        }
        assert found - {DESCRIPTION} == listed[name].keys()
        assert damage(checkpoint_of(values)) is None

    resumed = {
        f"as it is, {name}": changed(each, train={"resume": "auto"}) for name, each in runs.items()
    }
    for name, values in runs.items():
        old = resumed[f"of before, {name}"] = copied(values, f"before-{name}")
        in_version_3(checkpoint_of(old), [rank[name] for rank in states])
    lost = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    resumed["lost"] = copied(runs["3"], "lost")
    (checkpoint_of(resumed["lost"]) / lost).unlink()
    resumed["unlisted"] = copied(runs["3"], "unlisted")
    without_files(checkpoint_of(resumed["unlisted"]), lost)
    resumed["flipped"] = copied(runs["3"], "flipped")
    flipped = checkpoint_of(resumed["flipped"]) / lost
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    resumed["vanished"] = copied(runs["3"], "vanished")
    vanished = checkpoint_of(resumed["vanished"]) / "random" / "00001-of-00002.safetensors"
    ranks = run_ranks(
        "opened_again",
        2,
        tmp_path / "again",
        configs=resumed,
        vanishing={"vanished": vanished},
    )

    for rank, opened in enumerate(ranks):
        for name in runs:
            for way in ("as it is", "of before"):
                (state,), hashed, message = opened[f"{way}, {name}"]
                assert message == ""
                assert torch.equal(state, states[rank][name][0]), f"{way}, {name}, rank {rank}"
                others = ranks[1 - rank][f"{way}, {name}"][1]
                assert hashed
                assert not set(hashed) & set(others)
            as_it_is = [opened[f"as it is, {name}"] for opened in ranks]
            assert sum(len(hashed) for _, hashed, _ in as_it_is) == len(listed[name])
        for name, text in {
            "lost": f"{checkpoint_of(resumed['lost']) / lost} is missing",
            "unlisted": f"{checkpoint_of(resumed['unlisted']) / lost} is missing from ",
            "flipped": f"{flipped} does not have the content that was saved: its SHA-256 is "
            f"{file_sha256(flipped)} instead of {listed['3'][lost]['sha256']}",
            "vanished": f"{vanished} is listed in {vanished.parent.parent / DESCRIPTION}, but",
        }.items():
            assert text in opened[name][2], (name, rank)
    assert not torch.equal(states[0]["3"][0], states[1]["3"][0])

    # Another number of ranks: random states start afresh.
    ((state, _, message),) = (
        rank["3"]
        for rank in run_ranks(
            "opened_again",
            1,
            tmp_path / "alone",
            configs={"3": resumed["as it is, 3"]},
            vanishing={},
        )
    )
    assert message == ""
    assert not any(torch.equal(state[0], rank["3"][0]) for rank in states)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["optim_states", "model_states"])
def test_files_that_would_run_something_are_not_opened(
    place: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever a checkpoint of others says of its files; nor are those that it does not list."""
    values = changed(
        run_values,
        valuation={"enabled": False},
        train={"max_steps": 1, "save_every": 1},
    )
    assert run_ranks("run_trainers", 1, tmp_path / "ranks", configs={"": values}) == [{"": ""}]
    again = changed(values, train={"resume": "auto"})
    checkpoint = checkpoint_of(values)
    (file,) = checkpoint.glob(f"*{place}.pt")
    content, ran = torch.load(file, weights_only=False), tmp_path / "ran"
    content["more"] = Command(f"touch {ran}")
    torch.save(content, file)
    describe_again(checkpoint)
    assert "posix.system" in (damage(checkpoint) or "")
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "again", configs={"": again})
    assert f"{file} holds more than data, or none, and is not opened: " in messages[""]
    with pytest.raises(UserError, match="is not opened"):
        export_checkpoint(Path(values["train"]["output_dir"]), tmp_path / "exported")
    # Conversion opens files in processes of its own.
    with pytest.raises(UserError, match=r"posix\.system"):
        universal_checkpoint(checkpoint)
    (checkpoint / DESCRIPTION).unlink()
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "unlisted", configs={"": again})
    assert f"{checkpoint / DESCRIPTION} cannot be read" in messages[""]
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()


def saved_run(run_values: dict[str, Any]) -> Path:
    """A run of one step, in this process, with its checkpoint."""
    values = changed(
        run_values, valuation={"enabled": False}, train={"max_steps": 1, "save_every": 1}
    )
    Trainer(build_run(RunConfig.model_validate(values), SupervisedObjective())).train()
    return Path(values["train"]["output_dir"])


@pytest.mark.slow
def test_an_export_that_the_disk_refuses_leaves_nothing(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was killed leaves what the next one removes."""
    run, target = saved_run(run_values), tmp_path / "new" / "exported"

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as failing:
        failing.setattr(WeightFiles, "finish", refused)
        with pytest.raises(UserError, match=rf"cannot write the export {target}: .*No space left"):
            export_checkpoint(run, target)
        assert list(target.parent.iterdir()) == []
        failing.setattr(WeightFiles, "finish", killed)
        failing.setattr(PartialFolder, "discard", lambda _: None)  # a kill does not clean up
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(run, target)
        assert {path.suffix for path in target.parent.iterdir()} == {".partial"}
    export_checkpoint(run, target)
    assert list(target.parent.iterdir()) == [target]


def test_two_writers_of_one_folder_do_not_destroy_each_others(tmp_path: Path) -> None:
    target = tmp_path / "new" / "exported"
    first, second = PartialFolder(target), PartialFolder(target)
    first.create()
    (first.path / "weights").write_text("first")
    with pytest.raises(
        UserError,
        match=rf"another process is writing {target} \(it holds .*\.lock\.partial\); wait until",
    ):
        second.create()
    second.discard()  # as its caller does
    first.publish()
    first.discard()
    assert (target / "weights").read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
    second.create()
    second.discard()
    assert list(target.parent.iterdir()) == [target]


def test_a_link_stays_one_and_other_things_make_room(tmp_path: Path) -> None:
    """An export that lies on a larger disk is replaced there, as often as it is written."""
    (tmp_path / "large").mkdir()
    link, plain = tmp_path / "export", tmp_path / "plain"
    link.symlink_to(tmp_path / "large" / "export")  # where there is nothing yet
    plain.write_text("a file")
    for content in ("first", "second", "third"):
        for target in (link, plain):
            folder = PartialFolder(target)
            folder.create()
            (folder.path / "weights").write_text(content)
            folder.publish()
            folder.discard()
            assert (target / "weights").read_text() == content
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "large", "plain"]
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["export"]


def test_where_a_file_system_knows_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not lose its export at the end for want of a lock; a disk that is full is told."""
    folder = PartialFolder(tmp_path / "export")

    def refuse(code: int) -> None:
        def acquire(_lock: FileLock, *, blocking: bool) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(FileLock, "acquire", acquire)

    refuse(errno.ENOLCK)
    folder.create()
    (folder.path / "weights").write_text("all")
    folder.publish()
    folder.discard()
    assert (tmp_path / "export" / "weights").read_text() == "all"
    refuse(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        folder.create()


def test_a_folder_that_a_killed_writer_had_moved_away_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames of a replacement; and the next writer fails, too."""
    target = tmp_path / "exported"
    target.mkdir()
    (target / "weights").write_text("older")
    folder = PartialFolder(target)
    folder.create()
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path == folder.path:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as killing:
        killing.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.publish()
    assert not target.exists()
    folder.discard()
    next_one = PartialFolder(target)
    next_one.create()
    assert (target / "weights").read_text() == "older"
    next_one.discard()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_an_export_made_meanwhile_is_not_replaced(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process that ended between the first look and the writing."""
    run, target = saved_run(run_values), tmp_path / "exported"
    create = PartialFolder.create

    def create_late(folder: PartialFolder, *, replace: bool) -> None:
        target.mkdir()
        (target / "weights").write_text("of the other")
        create(folder, replace=replace)

    monkeypatch.setattr(PartialFolder, "create", create_late)
    with pytest.raises(UserError, match="exists; name a new folder"):
        export_checkpoint(run, target)
    assert [each.read_text() for each in target.iterdir()] == ["of the other"]


def test_the_folder_of_a_killed_writer_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    script = (
        "import sys, time; from pathlib import Path; from alphatoken.util.files import "
        "PartialFolder; folder = PartialFolder(Path(sys.argv[1])); folder.create(); "
        "(folder.path / 'torn').touch(); print('made', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(target)]
    folder = PartialFolder(target)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "made\n"
            with pytest.raises(UserError, match="another process is writing"):
                folder.create()
        finally:
            writer.kill()
    assert (folder.path / "torn").exists()
    folder.create()
    folder.publish()
    folder.discard()
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == []


def test_a_checkpoint_is_not_converted_twice_at_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    torch.save({}, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    files = described_files(checkpoint, list(checkpoint.iterdir()), 1)
    description = {"format_version": FORMAT_VERSION, "world_size": 1, "files": files}
    write_description(checkpoint, description)
    other = PartialFolder(universal_folder(checkpoint))
    other.create()
    with pytest.raises(UserError, match=f"another process is writing {checkpoint}-universal"):
        universal_checkpoint(checkpoint)
    assert other.path.exists()
    other.discard()


def test_a_key_of_a_source_that_is_new_and_not_set_is_no_change(run_values: dict[str, Any]) -> None:
    """Runs of an older version can be continued."""
    config = validate(RunConfig, run_values, "of the test")
    saved = config.model_dump(mode="json")
    del saved["data"]["train"][0]["name"], saved["data"]["workers"]
    assert accepted_changes(Path("step-2"), saved, config) == []
    saved["data"]["train"][0]["name"] = "another"
    with pytest.raises(UserError, match=r"data.train: was .*another"):
        accepted_changes(Path("step-2"), saved, config)
