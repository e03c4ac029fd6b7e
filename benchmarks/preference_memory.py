"""Peak memory of a valued preference step against a valued SFT step on the same documents, per
rank, under ZeRO-3.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.preference_memory --model models/smollm2
    --output FILE

Three runs of `launch/local.sh`, each in processes of its own: SFT on 2 n rows, preference on the
same rows as n pairs with the reference's losses cached, and with the reference online. All
documents have the same length. What is reported is the highest memory in use during three optimizer
steps (resident, less what a process has after its imports; on a GPU allocated), and its ratio to
that of SFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from alphatoken.cli import readable_errors
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.objectives.base import Objective
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer
from benchmarks.measuring import circumstances, reset_high_water, status, write_result

MODES = ("sft", "cached", "online")
STEPS = 3


def save_data(folder: Path, pairs: int, words: int) -> None:
    """The same documents as supervised rows and as pairs: prompts and responses of `words` short
    words each."""
    supervised, preference = [], []
    for part, count in (("train", pairs), ("held-out", 8)):
        for number in range(count):
            prompt = f"{part} {number:04}" + " a" * words
            answers = [f"{kind} {number:04}" + " b" * words for kind in ("good", "poor")]
            supervised.append(
                (part, [{"prompt": prompt, "response": answer} for answer in answers])
            )
            preference.append(
                (part, [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}])
            )
    for name, rows in (("sft", supervised), ("pairs", preference)):
        for part in ("train", "held-out"):
            lines = [json.dumps(row) + "\n" for found, own in rows for row in own if found == part]
            (folder / f"{name}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def run_values(
    kind: str, folder: Path, model: Path, *, ranks: int, documents: int, steps: int, run: str
) -> dict[str, Any]:
    """A run on what `save_data` has written: `kind` is sft or pairs, `run` names its folder. An
    optimizer step has two micro-batches of so many documents on each rank.
    """
    rows = documents // (2 if kind == "pairs" else 1)
    return {
        "model": {"name_or_path": str(model), "dtype": "bfloat16"},
        "data": {
            "train": str(folder / f"{kind}-train.jsonl"),
            "validation": str(folder / f"{kind}-held-out.jsonl"),
            "cache_dir": str(folder / "cache"),
        },
        "valuation": {"validation_sequences": 8},
        "fisher": {
            "sampling": "empirical",
            "num_prompts": 4,
            "batch_size": 1,
            "output": str(folder / f"fisher-{run}"),
        },
        "selection": {"keep_ratio": 0.5},  # as published
        "train": {
            "global_batch_size": 2 * ranks * rows,
            "micro_batch_size": rows,
            "max_steps": steps,
            "output_dir": str(folder / f"run-{run}"),
        },
    }


def build(mode: str, folder: Path, model: Path, micro_batch: int) -> Trainer:
    """A run with micro-batches of 2 `micro_batch` documents."""
    kind, ranks = "sft" if mode == "sft" else "pairs", collectives.world_size()
    values = run_values(
        kind, folder, model, ranks=ranks, documents=2 * micro_batch, steps=STEPS, run=mode
    )
    if mode == "sft":
        objective: Objective = SupervisedObjective()
        return Trainer(build_run(RunConfig.model_validate(values), objective))
    config = PreferenceRunConfig.model_validate({**values, "preference": {}, "reference": mode})
    return Trainer(build_run(config, PreferenceObjective(config.preference)))


def measure(mode: str, folder: Path, model: Path, micro_batch: int) -> dict[str, Any]:
    """Bytes of this rank at the peak of the steps; documents and tokens of the training data."""
    device = initialise_ranks()
    at_start = status("VmRSS")
    trainer = build(mode, folder, model, micro_batch)
    reset_high_water(cuda=device.type == "cuda")
    for step in range(STEPS):
        trainer.step.take(step, evaluates=False)
    peak = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM") - at_start
    )
    train = trainer.run.splits.train
    documents = sum(len(train[row]) for row in range(len(train)))
    return {"peak_bytes": peak, "documents": documents, "tokens": int(train.lengths.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    parser.add_argument("--micro-batch", type=int, default=2, help="pairs per micro-batch")
    parser.add_argument(
        "--words", type=int, default=256, help="words of each prompt and of each response"
    )
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        with readable_errors():
            own = measure(arguments.mode, arguments.folder, arguments.model, arguments.micro_batch)
            ranks = collectives.gather_objects(own)
            if collectives.rank() == 0:
                (arguments.folder / f"{arguments.mode}.json").write_text(
                    json.dumps(ranks), encoding="utf-8"
                )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_data(Path(folder), 64, arguments.words)
        for mode in MODES:
            options = ["--model", arguments.model, "--micro-batch", arguments.micro_batch]
            command = [
                "launch/local.sh",
                "--module",
                "benchmarks.preference_memory",
                "--mode",
                mode,
            ]
            subprocess.run([*command, "--folder", folder, *map(str, options)], check=True)
            results[mode] = json.loads((Path(folder) / f"{mode}.json").read_text())
    counts = {
        mode: [(rank["documents"], rank["tokens"]) for rank in ranks]
        for mode, ranks in results.items()
    }
    assert len({tuple(each) for each in counts.values()}) == 1, (
        f"the runs have other documents: {counts}"
    )
    peaks = {mode: max(rank["peak_bytes"] for rank in ranks) for mode, ranks in results.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        **circumstances("benchmarks.preference_memory", device, arguments.model),
        "per_rank": results,
        "over_sft": {mode: peak / peaks["sft"] for mode, peak in peaks.items()},
    }
    for mode, peak in peaks.items():
        print(f"{mode:>7}  {peak / 2**20:8.0f} MiB  {peak / peaks['sft']:.3f}")
    if arguments.output:
        write_result(result, arguments.output)


if __name__ == "__main__":
    main()
