r"""How fast rows are tokenised, beside the tokenizer's own speed, and in how much memory.

    python -m benchmarks.tokenising --model models/smollm2 --data DIR/dolly_train.jsonl.gz \
        --rows 20000 --workers 1 2

Rows are made of the responses in DATA: two exchanges in messages, as many characters as there are
about 500 tokens in. `alphatoken tokenise` runs on them as a command of its own, once for each
number of workers and each time into an empty cache. Memory is the sum over its processes of what
each holds, what they share counted once (PSS), looked at ten times a second. The tokenizer's own
speed is that of its library, one text at a time and without offsets, on the same texts as the chat
template writes them. Seconds of the processor count what the processes themselves use, whatever
else the machine does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from alphatoken.cli import readable_errors
from alphatoken.config.sections import Source
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import Encoder, Skipped
from alphatoken.data.tokenising import Made
from benchmarks.measuring import circumstances, write_result

CHARACTERS = (300, 700, 250, 800)
"""Of the four messages of a row."""
TICKS = os.sysconf("SC_CLK_TCK")


def write_rows(data: Path, rows: int, file: Path) -> None:
    """Rows of two exchanges from shuffled responses, all different."""
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        words = " ".join(json.loads(line)["response"] for line in lines).split(" ")
    generator = random.Random(0)

    def text(characters: int) -> str:
        start = generator.randrange(len(words) - characters)
        return " ".join(words[start : start + characters])[:characters].strip()

    with file.open("w", encoding="utf-8") as target:
        for number in range(rows):
            messages = [
                {"role": ("user", "assistant")[place % 2], "content": f"{number} {text(length)}"}
                for place, length in enumerate(CHARACTERS)
            ]
            target.write(json.dumps({"messages": messages}) + "\n")


def alone(model: Path, file: Path, sample: int) -> dict[str, float]:
    """Rows per second of the processor of the tokenizer alone, and of all that makes a row, in
    this process."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = Encoder(tokenizer, 2048)
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(sample), strict=False)]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]

    def encode() -> int:
        found = [encoder.encode(row, "here") for row in rows]
        return sum(
            len(each.documents[0].input_ids)
            for row in found
            if not isinstance(row, Skipped)
            for each in row
        )

    def tokenise() -> int:
        backend = tokenizer.backend_tokenizer
        return sum(len(backend.encode(text, add_special_tokens=False).ids) for text in texts)

    (tokens, tokenizing), (same, encoding) = timed(tokenise), timed(encode)
    assert tokens == same, "the tokenizer saw other texts"
    return {
        "tokens per row": tokens / len(rows),
        "tokenizer alone": len(rows) / tokenizing,
        "rows with masks": len(rows) / encoding,
    }


def timed(call: Callable[[], int]) -> tuple[int, float]:
    """What a call gives, and the seconds of the processor that it takes."""
    began = time.process_time()
    return call(), time.process_time() - began


def processes(session: int) -> Iterator[tuple[int, float, int]]:
    """Number, seconds of the processor, and bytes of each process of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                held = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                yield int(folder.name), (int(fields[11]) + int(fields[12])) / TICKS, held * 1024
        except (OSError, IndexError, StopIteration):  # it has ended
            continue


def command(model: Path, file: Path, cache: Path, workers: int) -> dict[str, Any]:
    """Runs `alphatoken tokenise` into an empty cache."""
    config = cache.with_suffix(".yaml")
    config.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(model)},
                "data": {"train": str(file), "cache_dir": str(cache), "workers": workers},
                "valuation": {"enabled": False},
                "train": {"output_dir": str(cache / "unused")},
            }
        )
    )
    began = time.perf_counter()
    running = subprocess.Popen(
        [sys.executable, "-m", "alphatoken", "tokenise", "--config", str(config)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    used: dict[int, float] = {}
    peak = most = 0
    while running.poll() is None:
        seen = list(processes(running.pid))
        used |= {number: seconds for number, seconds, _ in seen}
        peak = max(peak, sum(held for *_, held in seen))
        most = max(most, len(seen))
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    assert running.stdout is not None
    said = running.stdout.read()
    assert running.returncode == 0, said
    (made,) = cache.glob("*.arrow")
    return {
        "workers": workers,
        "seconds": seconds,
        "load of the machine, a minute's mean": os.getloadavg()[0],
        "rows per second": float(said.rsplit("(", 1)[1].split()[0]),
        "seconds of the processor": sum(used.values()),
        "processes": most,
        "peak bytes of all": peak,
        "bytes of the file": made.stat().st_size,
        "sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
        **opened(file, made),
    }


def opened(file: Path, made: Path) -> dict[str, float]:
    """Seconds until a run has the rows, and for a row in random order then."""
    began = time.perf_counter()
    dataset = TokenDataset([Source(path=str(file))], [made], [Made(0, 0.0)])
    ready = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(dataset))[:1000]
    for row in order:
        dataset[int(row)]
    return {
        "seconds to open": ready - began,
        "seconds per row read": (time.perf_counter() - ready) / len(order),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows with a response")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sample", type=int, default=2000, help="rows for the tokenizer alone")
    parser.add_argument("--beside", default="nothing else", help="what else the machine runs")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = circumstances("benchmarks.tokenising", torch.device("cpu"), arguments.model)
    result |= {"rows": arguments.rows, "beside": arguments.beside}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(arguments.data, arguments.rows, file)
        result["bytes of the rows"] = file.stat().st_size
        result["per second of the processor"] = alone(arguments.model, file, arguments.sample)
        result["runs"] = []
        for workers in arguments.workers:
            result["runs"].append(
                command(arguments.model, file, Path(folder) / f"cache-{workers}", workers)
            )
            print(json.dumps(result["runs"][-1]), flush=True)
    print(json.dumps(result["per second of the processor"]))
    if arguments.output:
        write_result(result, arguments.output)


if __name__ == "__main__":
    with readable_errors():
        main()
