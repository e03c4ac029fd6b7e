"""Peak memory of a valued step on long rows, by how many ranks divide them.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.long_context --ranks 4 --parts 1 2 4 --tokens
    2048 --output FILE

For each of `--parts`, `launch/local.sh` starts the same number of ranks, which train on rows of
`--tokens` tokens, as many at a time as there are data groups, so that weights and optimizer take
the same on every rank. What is reported is the highest memory in use during the second step, above
what was in use before it (resident; on a GPU allocated), and with what was, of the rank that took
most. Without `--model` it is a random Llama of eight layers with hidden size 512 and eight heads.
Without `--ranks` there are as many as parts, for one row.

With `--limit MIB` a CPU rank gets no more memory than that in all. Where the step needs more, an
allocation fails: that is the result of a single rank, and ends several. Blocks have to be mapped
one by one for it to be exact (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from alphatoken.cli import readable_errors
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer
from benchmarks.measuring import (
    Peak,
    circumstances,
    reset_high_water,
    seconds,
    status,
    write_result,
)
from recipes.quickstart.get_model import save_tiny


def save_model(folder: Path, tokens: int) -> None:
    """A random Llama with the tokenizer of the quickstart's tiny model."""
    save_tiny(folder)
    vocabulary = transformers.AutoConfig.from_pretrained(folder).vocab_size
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def config_of(folder: Path, arguments: argparse.Namespace, ranks: int) -> RunConfig:
    """Two steps of one micro-batch of one row on each data group; rows are cut to so many
    tokens."""
    held_out = arguments.held_out_tokens or arguments.tokens
    for part, count, tokens in (
        ("train", 2 * ranks, arguments.tokens),
        ("validation", ranks, held_out),
    ):
        rows = [{"prompt": f"{part} {row}", "response": " b" * tokens} for row in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    (parts,) = arguments.parts
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(arguments.model), "dtype": arguments.dtype},
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "max_length": arguments.tokens,
                "cache_dir": str(folder / "cache"),
            },
            "valuation": {
                "enabled": not arguments.without_valuation,
                "layers": arguments.layers,
                "stability_weight": 0.0,
                "validation_sequences": ranks // parts,
            },
            "selection": {"keep_ratio": 0.5},  # as published
            "train": {
                "global_batch_size": ranks // parts,
                "micro_batch_size": 1,
                "sequence_parallel": parts,
                "gradient_checkpointing": arguments.checkpointing,
                "max_steps": 2,
                "output_dir": str(folder / "run"),
            },
        }
    )


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step takes on this rank: the second one, or the first."""
    device = initialise_ranks()
    config = collectives.on_rank_0(
        lambda: config_of(folder, arguments, collectives.world_size()).model_dump_json()
    )
    run = build_run(RunConfig.model_validate_json(config), SupervisedObjective())
    trainer = Trainer(run)
    warm_up = 0 if arguments.first_step else 1
    for number in range(warm_up):
        trainer.step.take(number, evaluates=False)
    took: list[float] = []

    def step() -> None:
        took.append(seconds(lambda: trainer.step.take(warm_up, evaluates=False), device))

    lengths = {int(length) for length in run.splits.train.lengths}
    about = {"row_tokens": max(lengths), "before_bytes": in_use(device)}
    if arguments.limit:
        limit_memory(arguments.limit * 2**20)
    try:
        peak = Peak(device).of(step)
    except RuntimeError as error:
        # Ranks that share rows would wait for the one that failed.
        if collectives.world_size() > 1 or "allocate memory" not in str(error):
            raise
        return {**about, "failed": str(error).splitlines()[0]}
    return {**about, "peak_bytes": peak, "seconds": took[0]}


def in_use(device: torch.device) -> int:
    """Memory that this rank uses now, resident or, on a GPU, allocated."""
    reset_high_water(cuda=device.type == "cuda")
    return torch.cuda.memory_allocated() if device.type == "cuda" else status("VmRSS")


def limit_memory(most: int) -> None:
    """From now on this process gets no more memory than `most` bytes with what is resident: its
    data may grow by what is left."""
    left = most - status("VmRSS")
    assert left > 0, f"{status('VmRSS')} bytes are in use before the step"
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + left, resource.RLIM_INFINITY))


def run_parts(parts: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--folder", folder, "--model", arguments.model, "--parts", parts]
        options += ["--tokens", arguments.tokens, "--dtype", arguments.dtype]
        options += ["--layers", arguments.layers, "--limit", arguments.limit]
        options += ["--held-out-tokens", arguments.held_out_tokens]
        for flag in ("checkpointing", "without_valuation", "first_step"):
            options += [f"--{flag.replace('_', '-')}"] if getattr(arguments, flag) else []
        command = ["launch/local.sh", "--module", "benchmarks.long_context", *map(str, options)]
        environment = {**os.environ, "RANKS": str(arguments.ranks or parts)}
        subprocess.run(command, check=True, env=environment)
        found: list[dict[str, Any]] = json.loads((Path(folder) / "result.json").read_text())
    return found


def told(ranks: list[dict[str, Any]]) -> str:
    """What the ranks found, of the one that took most."""
    for rank in ranks:
        if "failed" in rank:
            return str(rank["failed"])
    whole = max(rank["before_bytes"] + rank["peak_bytes"] for rank in ranks)
    peak, slowest = (max(rank[key] for rank in ranks) for key in ("peak_bytes", "seconds"))
    return f"{peak / 2**20:7.0f} MiB, {whole / 2**20:7.0f} in all, {slowest:5.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    parser.add_argument("--ranks", type=int, help="without it as many as parts")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--without-valuation", action="store_true")
    parser.add_argument("--first-step", action="store_true", help="measure it, not the second")
    parser.add_argument("--layers", type=int, default=3, help="last layers that are valued")
    parser.add_argument("--held-out-tokens", type=int, default=0, help="without it as --tokens")
    parser.add_argument("--limit", type=int, default=0, help="MiB that a CPU rank may use in all")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        with readable_errors():
            ranks = collectives.gather_objects(measure(arguments.folder, arguments))
            if collectives.rank() == 0:
                (arguments.folder / "result.json").write_text(json.dumps(ranks), encoding="utf-8")
        return
    results: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            arguments.model = Path(folder)
            save_model(arguments.model, arguments.tokens)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        about = circumstances("benchmarks.long_context", device, arguments.model)
        for parts in arguments.parts:
            results[parts] = run_parts(parts, arguments)
    for parts, ranks in results.items():
        print(f"{parts} parts of {ranks[0]['row_tokens']} tokens: {told(ranks)}")
    if arguments.output:
        write_result(
            {**about, "ranks": arguments.ranks or "as many as parts", "parts": results},
            arguments.output,
        )


if __name__ == "__main__":
    main()
