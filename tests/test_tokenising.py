"""Large sources are tokenised in shards by several processes; what comes out does not show it."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source
from alphatoken.data import tokenising
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoded, Encoder, RowEncoder, Skipped
from alphatoken.data.pairs import PairEncoder
from alphatoken.data.sources import OpenSource
from alphatoken.data.splits import load_prompts, load_splits
from alphatoken.errors import UserError
from tests.ranks import ensure_server

ROWS = 40


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 shards the last one is short."""
    monkeypatch.setattr(tokenising, "SHARD_ROWS", 7)


@pytest.fixture
def server() -> None:
    """Workers are forked from the server of the tests, which has imported everything."""
    ensure_server()


def supervised(number: int) -> dict[str, str]:
    """Some are cut, some are skipped, some have a column that is not read."""
    row = {"prompt": f"{number}?", "response": "yes " * (number % 9)}
    return {**row, "id": "x"} if number > 30 else row


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"{number}?", "chosen": "yes " * (number % 9 + 1), "rejected": "no"}


def as_lines(rows: list[dict[str, str]], folder: Path) -> str:
    """With blank lines, which count as lines and not as rows."""
    file = folder / "rows.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" * (1 + (n % 5 == 0)) for n, row in enumerate(rows))
    )
    return str(file)


def as_gzip(rows: list[dict[str, str]], folder: Path) -> str:
    file = folder / "rows.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return str(file)


def as_parquet(rows: list[dict[str, str]], folder: Path) -> str:
    """With a group of rows that ends within a shard."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=16)
    return str(folder / "rows.parquet")


def as_dataset(rows: list[dict[str, str]], folder: Path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks, by name."""
    return {
        str(file.relative_to(cache)): file.read_bytes()
        for file in cache.rglob("*")
        if file.is_file() and file.suffix != ".lock"
    }


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("row", [supervised, pair])
@pytest.mark.parametrize("stored", [as_lines, as_gzip, as_parquet, as_dataset])
def test_the_number_of_workers_leaves_no_trace(
    row: Callable[[int], dict[str, str]],
    stored: Callable[[list[dict[str, str]], Path], str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do shards: the rows are those that one process writes at once."""
    path = stored([row(number) for number in range(ROWS)], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder: RowEncoder = (
        Encoder(tokenizer, 55) if row is supervised else PairEncoder(tokenizer, 50, 20)
    )
    sources = [Source(path=path, skip=2, first=37)]
    one, three = (
        tokenise(sources, encoder, tmp_path / str(workers), workers) for workers in (1, 3)
    )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "3")) == 2, "the shards are gone"
    assert one.made[0].rows == three.made[0].rows == 37
    monkeypatch.setattr(tokenising, "SHARD_ROWS", ROWS)
    whole = tokenise(sources, encoder, tmp_path / "whole")
    assert str(three.reports) == str(whole.reports)
    assert three.reports[0].cut
    assert_same_rows(three, whole)


def assert_same_rows(one: TokenDataset, other: TokenDataset) -> None:
    assert len(one) == len(other) > 0
    for row in range(len(one)):
        assert one.location(row) == other.location(row)
        for document, expected in zip(one[row], other[row], strict=True):
            assert [part.tolist() for part in document] == [part.tolist() for part in expected]


class Hindered:
    """Encodes rows, and on the way does what is wanted to some."""

    def __init__(self, encoder: Encoder, folder: Path, seconds: float, ends_at: str | None) -> None:
        self._encoder, self._folder, self._seconds = encoder, folder, seconds
        self._ends_at = ends_at

    @property
    def identity(self) -> str:
        return self._encoder.identity

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        (self._folder / str(os.getpid())).touch()
        time.sleep(self._seconds)
        if fields["prompt"] == self._ends_at:
            os._exit(9)
        return self._encoder.encode(fields, where)


def _tokenise_slowly(path: str, encoder: Hindered, cache: Path, workers: int) -> None:
    tokenising.SHARD_ROWS = 7
    tokenise([Source(path=path)], encoder, cache, workers)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    workers: int, tiny_model: Path, tmp_path: Path
) -> None:
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    expected = tokenise([Source(path=path)], encoder, tmp_path / "never killed", 1)

    cache, pids = tmp_path / "cache", tmp_path / "pids"
    pids.mkdir()
    process = multiprocessing.get_context("forkserver").Process(
        target=_tokenise_slowly, args=(path, Hindered(encoder, pids, 0.05, None), cache, workers)
    )
    process.start()
    wait_until(lambda: len(list(cache.glob("*.shards/*.arrow"))) >= 2)
    process.kill()
    process.join()
    wait_until(lambda: not any(is_alive(int(file.name)) for file in pids.iterdir()))
    shards = list(cache.glob("*.shards/*.arrow"))
    assert 2 <= len(shards) < 6
    assert not list(cache.glob("*.arrow"))

    counting = Counting(encoder)
    again = tokenise([Source(path=path)], counting, cache, 1)
    assert counting.rows == again.made[0].rows == ROWS - 7 * len(shards)
    assert contents(cache) == contents(tmp_path / "never killed")
    assert_same_rows(again, expected)


class Counting:
    """Encodes rows, and counts them."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.rows = 0

    @property
    def identity(self) -> str:
        return self._encoder.identity

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        self.rows += 1
        return self._encoder.encode(fields, where)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; not where it has ended and nobody has asked how."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("bad", ['{"prompt": "Hi"}', '{"prompt": "Hi", "response": 7}', "{"])
def test_the_first_of_several_bad_rows_is_named(bad: str, tiny_model: Path, tmp_path: Path) -> None:
    """With workers, the second one is found first."""
    lines = [json.dumps(supervised(number)) for number in range(ROWS)]
    lines[13] = lines[14] = bad  # the last of a shard, and the first of the next one
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    messages = []
    for workers in (1, 3):
        with pytest.raises(UserError, match=rf"{file}:14: ") as failure:
            tokenise([Source(path=str(file))], encoder, tmp_path / str(workers), workers)
        messages.append(str(failure.value))
    assert messages[0] == messages[1]


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_worker_that_dies_ends_with_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    (tmp_path / "pids").mkdir()
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    dying = Hindered(encoder, tmp_path / "pids", 0, "20?")
    with pytest.raises(UserError, match=r"rows.jsonl ended .* lower data.workers"):
        tokenise([Source(path=path)], dying, tmp_path / "cache", 2)


@pytest.mark.parametrize("stored", [as_lines, as_gzip, as_parquet, as_dataset])
def test_parts_of_a_source_can_be_read_in_any_order(
    stored: Callable[[list[dict[str, str]], Path], str], tmp_path: Path
) -> None:
    path = stored([supervised(number) for number in range(ROWS)], tmp_path)
    rows = OpenSource(Source(path=path, skip=3, first=30))
    assert len(rows) == 30
    whole = list(rows.read())
    assert [row.fields["prompt"] for row in whole] == [f"{number}?" for number in range(3, 33)]
    for first, end in ((0, 4), (4, 9), (20, 30), (9, 20), (29, 99), (40, 50)):
        assert list(rows.read(first, end)) == whole[first:end]
    assert len(OpenSource(Source(path=path, skip=38, first=5))) == 2
    assert len(OpenSource(Source(path=path, skip=50))) == 0


def test_progress_is_not_in_the_way_of_what_a_command_prints(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`alphatoken doctor --json` and `plan --from-data --json` tokenise, too."""
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)
    printed = capsys.readouterr()
    assert f"tokenising {path}: 7/40 rows  ETA " in printed.err
    assert f"tokenising {path}: 40/40 rows" in printed.err
    assert printed.out == ""


def test_a_batch_ends_with_many_tokens(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that long rows are not held in memory by the thousand."""
    path = as_lines([supervised(5) for _ in range(7)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    whole = tokenise([Source(path=path)], encoder, tmp_path / "cache")
    monkeypatch.setattr(tokenising, "TOKENS_PER_BATCH", 2 * int(whole.lengths[0]))
    cut = tokenise([Source(path=path)], encoder, tmp_path / "small")
    sizes = []
    with pa.OSFile(str(cut.files[0])) as content, pa.ipc.open_stream(content) as batches:
        sizes = [len(batch) for batch in batches]
    assert sizes == [2, 2, 2, 1]
    assert_same_rows(cut, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_run_finds_what_the_command_has_tokenised(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Also the prompts of the Fisher, which are other tokens."""
    file = tmp_path / "run.yaml"
    values = {**run_values, "fisher": {"sampling": "rollout", "max_prompt_tokens": 50}}
    file.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["tokenise", "--config", str(file), "data.workers=2"])
    assert result.exit_code == 0, result.output
    for name, rows in (("train", 30), ("validation", 7), ("eval", 5)):
        assert f"data.{name}: {values['data'][name]}: {rows} rows, " in result.output
    assert "fisher.prompts: " in result.output
    assert " rows/s)" in result.output
    made = contents(tmp_path / "cache")
    assert all(f"{tmp_path}/cache/{name}" in result.output for name in made if ".arrow" in name)

    config = validate(RunConfig, values, "of the test")
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    splits = load_splits(config, tokenizer)
    prompts = load_prompts(config, tokenizer, splits.train)
    for part in (*splits.named().values(), prompts.dataset):
        assert [each.rows for each in part.made] == [0]
    assert contents(tmp_path / "cache") == made
    again = CliRunner().invoke(app, ["tokenise", "--config", str(file)])
    assert again.output.count("(was there)") == 4


def test_a_long_answer_is_not_tokenised_twice(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find where it ends, only its end is."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder, answer = Encoder(tokenizer, 5000), "seven eleven " * 300 + "twelve"
    characters = 0
    plain = type(tokenizer).__call__

    def counted(self: Any, text: str, **options: Any) -> Any:
        nonlocal characters
        characters += len(text)
        return plain(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    found = encoder.encode({"prompt": "Count.", "response": answer}, "here")
    assert not isinstance(found, Skipped)
    ((document,),) = (each.documents for each in found)
    trained = [
        token
        for token, mark in zip(document.input_ids, document.response_mask, strict=True)
        if mark
    ]
    assert tokenizer.decode(trained) == f"{answer}<|im_end|>"
    assert characters < 1.2 * len(answer)


def test_a_read_only_cache_that_has_the_rows_is_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    made = tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    # Root, who may run the tests, can write whatever the permissions.
    monkeypatch.setattr("alphatoken.data.cache.FileLock", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    found = tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)
    assert_same_rows(found, made)
    assert found.made[0].rows == 0
    with pytest.raises(
        UserError, match=r"cannot write .*Read-only.* set data\.cache_dir to another"
    ):
        tokenise([Source(path=path, skip=1)], encoder, tmp_path / "cache", 1)


@pytest.mark.parametrize("damage", ["a batch", "half", "all", "report", "half of report"])
def test_a_damaged_cache_is_made_again(
    damage: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file that was cut reads as one of fewer rows."""
    monkeypatch.setattr(tokenising, "SHARD_ROWS", ROWS)
    monkeypatch.setattr(tokenising, "ROWS_PER_BATCH", 10)
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    whole = tokenise([Source(path=path)], encoder, tmp_path / "cache")
    assert whole.made[0].rows == ROWS
    (file,) = whole.files
    content, report = file.read_bytes(), file.with_suffix(".json")
    told = report.read_text()
    damage_file(damage, file, report)
    again = tokenise([Source(path=path)], encoder, tmp_path / "cache")
    assert again.made[0].rows == ROWS
    assert (file.read_bytes(), report.read_text()) == (content, told)
    assert_same_rows(again, whole)
    assert tokenise([Source(path=path)], encoder, tmp_path / "cache").made[0].rows == 0


def damage_file(damage: str, file: Path, report: Path) -> None:
    """As a full disk or a copy that was stopped leaves it; rows are lost, or their report."""
    content = file.read_bytes()
    if damage == "a batch":
        with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as batches:
            batches.read_next_batch()
            end = opened.tell()
        file.unlink()
        file.write_bytes(content[:end])
        with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as batches:
            assert 0 < len(batches.read_all()) < ROWS, "it can be read"
    elif damage == "report":
        report.unlink()
    elif damage == "half of report":
        report.write_text(report.read_text()[:20])
    else:
        file.unlink()
        file.write_bytes(content[: len(content) // 2 if damage == "half" else 0])


def test_a_damaged_shard_is_made_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokenising, "_join", stopped)
        with pytest.raises(KeyboardInterrupt):
            tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)
    damaged = sorted((tmp_path / "cache").glob("*.shards/*.arrow"))[1]
    damaged.write_bytes(b"")
    again = tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)
    assert again.made[0].rows == 7, "the shard, and no other"
    assert_same_rows(again, tokenise([Source(path=path)], encoder, tmp_path / "other", 1))


def test_a_cache_that_cannot_be_written_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_lines([supervised(number) for number in range(ROWS)], tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 70)
    file = tmp_path / "a file"
    file.touch()
    with pytest.raises(UserError, match=rf"to data.cache_dir={file}: .*File exists.*make room"):
        tokenise([Source(path=path)], encoder, file)

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenising, "_write", refused)
    with pytest.raises(UserError, match=rf"{path} to data.cache_dir={tmp_path}/cache: .*No space"):
        tokenise([Source(path=path)], encoder, tmp_path / "cache", 1)
    assert not list(tmp_path.rglob("*.partial"))
