"""The rows of a study: what is trained on, what steers, what is chosen by and what is reported."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphatoken.errors import UserError
from recipes.quickstart.make_data import problems
from recipes.transcripts import convert, hold_out

Row = dict[str, Any]
Parts = dict[str, list[Row]]
PARTS = ("held_out", "tuning", "train", "test")


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where rows come from."""

    make: Callable[[Mapping[str, int], int, Path | None], Parts]
    """From the size of each part, a seed and the folder of the data sets, the rows of each."""
    pairs: bool = False


def read_data(folder: Path | None, name: str) -> list[Row]:
    """The rows of a data set. Raises UserError where it is not there."""
    file = data_file(folder, name)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def data_file(folder: Path | None, name: str) -> Path:
    """The file of a data set. Raises UserError where it is not there."""
    if folder is None:
        raise UserError(f"{name}.jsonl.gz is needed: give the folder that has it as --data DIR")
    file = folder / f"{name}.jsonl.gz"
    if not file.exists():
        raise UserError(f"--data {folder}: there is no {file.name} in it")
    return file


def write_rows(rows: Iterable[Row], file: Path) -> None:
    """Writes JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _generated(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    return {
        part: [{"prompt": prompt, "response": response} for prompt, response in rows]
        for part, rows in problems(seed, sizes).items()
    }


def _gsm8k(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    parts = _dealt(read_data(folder, "gsm8k_train"), {**sizes, "test": 0}, seed)
    return {**parts, "test": read_data(folder, "gsm8k_test")[: sizes["test"]]}


def _dolly(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    return _dealt(read_data(folder, "dolly_train"), sizes, seed)


def _mbpp(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    """Tests are tasks 11 to 510, as is the custom; all others are dealt to the other parts."""
    tasks = read_data(folder, "mbpp")
    tests = [_program(task) for task in tasks if 11 <= task["task_id"] <= 510]
    others = [_program(task) for task in tasks if not 11 <= task["task_id"] <= 510]
    return {**_dealt(others, {**sizes, "test": 0}, seed), "test": tests[: sizes["test"]]}


def _program(task: Row) -> Row:
    asserts = "\n".join(task["test_list"])
    return {
        "prompt": f"{task['text']}\nYour code should pass these tests:\n{asserts}",
        "response": task["code"].replace("\r\n", "\n").strip(),
    }


def _hh(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    return _pairs("hh_rlhf_helpful", sizes, folder)


def _oasst(sizes: Mapping[str, int], seed: int, folder: Path | None) -> Parts:
    return _pairs("oasst_pairs", sizes, folder)


def _pairs(name: str, sizes: Mapping[str, int], folder: Path | None) -> Parts:
    """Held-out and tuning rows are of other conversations than those that are trained on."""
    rows, held_out = hold_out(convert(data_file(folder, f"{name}_train")), sizes["held_out"])
    rows, tuning = hold_out(rows, sizes["tuning"])
    return {
        "held_out": held_out[: sizes["held_out"]],
        "tuning": tuning[: sizes["tuning"]],
        "train": rows[: sizes["train"]],
        "test": convert(data_file(folder, f"{name}_test"))[: sizes["test"]],
    }


def _dealt(rows: list[Row], sizes: Mapping[str, int], seed: int) -> Parts:
    """Deals shuffled rows to the parts, in the order of PARTS; what is trained on may be fewer
    than asked for."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    reserved = sum(sizes[part] for part in PARTS if part != "train")
    train = min(sizes["train"], len(rows) - reserved)
    if train < 1:
        raise UserError(f"{len(rows)} rows are too few for parts of {dict(sizes)}")
    parts: Parts = {}
    start = 0
    for part in PARTS:
        size = train if part == "train" else sizes[part]
        parts[part] = shuffled[start : start + size]
        start += size
    return parts


PROVIDERS: dict[str, Provider] = {
    "problems": Provider(make=_generated),
    "gsm8k": Provider(make=_gsm8k),
    "dolly": Provider(make=_dolly),
    "mbpp": Provider(make=_mbpp),
    "hh": Provider(make=_hh, pairs=True),
    "oasst": Provider(make=_oasst, pairs=True),
}
