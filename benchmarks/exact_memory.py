"""Peak memory of `exact` on all parameters of all layers, for models of different depth, per rank,
under ZeRO-3.

    MALLOC_MMAP_THRESHOLD_=65536 launch/local.sh --module benchmarks.exact_memory

Random Llamas of equal width and 4, 8 and 16 layers, each with two directions (G and V). What is
reported is the peak of a call above what was resident before it: model shards, optimizer, slices of
G, Fisher and reference do grow with depth.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alphatoken.cli import readable_errors
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.models.decoder import decoder_of
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer
from benchmarks.measuring import Peak
from recipes.quickstart.get_model import save_tiny

DEPTHS = (4, 8, 16)
WIDTH = 512


def save_model(folder: Path, depth: int) -> None:
    """A random Llama with the tiny model's tokenizer."""
    save_tiny(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_rows(file: Path, name: str, count: int) -> str:
    rows = [
        {"prompt": f"{name} {number}: " + "a" * 200, "response": "b" * 200}
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def measure(folder: Path, depth: int) -> dict[str, int]:
    """Peaks of this rank: of a refresh with 4 held-out sequences per rank, and of scoring 4
    sequences."""
    model = folder / f"model-{depth}"

    def prepare() -> None:
        save_model(model, depth)
        for part, count in (("train", 8), ("validation", 8)):
            save_rows(folder / f"{part}.jsonl", part, count)

    collectives.on_rank_0(prepare)
    per_rank = 4
    values = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "cache_dir": str(folder / "cache"),
        },
        "valuation": {
            "estimator": "exact",
            "layers": "all",
            "parameters": "all",
            "validation_sequences": per_rank * collectives.world_size(),
        },
        "fisher": {"sampling": "empirical", "num_prompts": 2, "batch_size": 1},
        "selection": {"keep_ratio": 0.5},  # as published
        "train": {
            "global_batch_size": per_rank * collectives.world_size(),
            "micro_batch_size": per_rank,
            "output_dir": str(folder / f"run-{depth}"),
        },
    }
    trainer = Trainer(build_run(RunConfig.model_validate(values), SupervisedObjective()))
    scorer = trainer.run.model.scorer
    assert scorer is not None
    held_out = trainer.feed.held_out(0)
    (batch,) = trainer.feed.training(0).batches
    scorer.refresh(held_out)
    with torch.no_grad(), scorer.capture() as capture:
        decoder_of(trainer.run.model.lm).hidden_states(batch)
    entry = capture.entry
    scorer.score(entry, batch)  # warm-up
    peak = Peak(trainer.run.device)
    peaks = {
        "refresh": peak.of(lambda: scorer.refresh(held_out)),
        "score": peak.of(lambda: scorer.score(entry, batch)),
    }
    state = batch["input_ids"].numel() * WIDTH * 4
    trainer.run.engine.destroy()
    return {**peaks, "states between the layers (in refresh)": (depth + 1) * state}


def main() -> None:
    initialise_ranks()
    shared = collectives.on_rank_0(tempfile.mkdtemp)
    results = {depth: collectives.gather_objects(measure(Path(shared), depth)) for depth in DEPTHS}
    if collectives.rank() == 0:
        json.dump(
            {f"{depth} layers": ranks for depth, ranks in results.items()}, sys.stdout, indent=1
        )
        print()
        shutil.rmtree(shared)


if __name__ == "__main__":
    with readable_errors():
        main()
