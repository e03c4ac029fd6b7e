"""What `valuation.refresh_every` does to values: held-out signals some optimizer steps old against
those of the current weights.

    python -m benchmarks.staleness --model models/smollm2 --data DIR/gsm8k_train.jsonl.gz
        --dtype float32 --max-length 128 --output FILE.json

One process trains on every response token, at `optim.lr` from the first step on. After each number
of steps the rows of the next step are valued three times (`ghost`, last 3 layers, adaptation only):
with held-out signals of the starting weights, with those of the same rows at the current weights,
and with those of other rows. The first two tell what age does, the last two what the draw does
anyhow. Signals are n - 1 steps old at most with `refresh_every: n`.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.training.moments import rank_correlation
from alphatoken.training.trainer import Trainer
from alphatoken.values.estimator import Scorer
from alphatoken.values.registry import build_scorer
from benchmarks.measuring import build_trainer, circumstances, cost_parser, run_cost


def trainer_of(arguments: argparse.Namespace, folder: str) -> Trainer:
    """One that keeps every token and its learning rate, with adaptation in one value."""
    sections = {
        "selection": {"policy": "all"},
        "optim": {"lr": arguments.lr, "warmup_ratio": 0.0, "schedule": "constant"},
        "train": {"global_batch_size": arguments.rows, "max_steps": max(arguments.ages)},
    }
    rows = arguments.validation_sequences
    return build_trainer(arguments, folder, sections, validation_sequences=rows)


def train(trainer: Trainer, step: int) -> None:
    """One optimizer step on every response token."""
    trainer.run.model.attach(None)
    batches = trainer.feed.training(step).batches
    tokens = sum(batch["response_index"].count for batch in batches)
    for batch in batches:
        total = trainer.run.engine(batch)["total"]
        trainer.run.engine.backward(total / tokens, scale_wrt_gas=False)
        trainer.run.engine.step()


@torch.no_grad()
def values_of(scorer: Scorer, batches: list[Batch]) -> Tensor:
    """Values of the response tokens of some micro-batches, (R,)."""
    parts = []
    for batch in batches:
        with scorer.capture() as capture:
            scorer.decoder.hidden_states(batch)
        values = scorer.score(capture.entry, batch).values
        parts.append(batch["response_index"].take(values.composite))
    return torch.cat(parts)


def kept_by_both(first_R: Tensor, second_R: Tensor) -> float:
    """Share of the best half by one that is in the best half by the other, too."""
    count = len(first_R) // 2
    best = [set(each.topk(count).indices.tolist()) for each in (first_R, second_R)]
    return len(best[0] & best[1]) / count


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(arguments, folder)
        run = trainer.run
        assert run.model.scorer is not None
        current = run.model.scorer
        old = build_scorer(current.decoder, run.config.valuation, run.device, drift=None)
        held_out, others = trainer.feed.held_out(0), trainer.feed.held_out(1)
        old.refresh(held_out, 10**4)
        for step in range(max(arguments.ages) + 1):
            if step in arguments.ages:
                rows = trainer.feed.training(step).batches
                old.refresh(None)
                current.refresh(held_out, 10**4)
                aged_R, fresh_R = values_of(old, rows), values_of(current, rows)
                current.refresh(others, 10**4)
                drawn_R = values_of(current, rows)
                found.append(
                    {
                        "steps": step,
                        "tokens": len(fresh_R),
                        "rank correlation, age": rank_correlation(aged_R, fresh_R),
                        "kept by both, age": kept_by_both(aged_R, fresh_R),
                        "rank correlation, draw": rank_correlation(drawn_R, fresh_R),
                        "kept by both, draw": kept_by_both(drawn_R, fresh_R),
                    }
                )
            if step < max(arguments.ages):
                train(trainer, step)
    return {
        **circumstances("benchmarks.staleness", run.device, arguments.model),
        **{name: getattr(arguments, name) for name in ("lr", "rows", "validation_sequences")},
        "ages": found,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(*(result["ages"][0]), title=result["device"])
    for row in result["ages"]:
        cells = [f"{each:.3f}" if isinstance(each, float) else str(each) for each in row.values()]
        table.add_row(*cells)
    Console(width=130).print(table)


def main() -> None:
    parser = cost_parser(__doc__)
    parser.set_defaults(split_terms=False)
    parser.add_argument("--ages", type=int, nargs="+", default=[1, 3, 15], help="in steps")
    parser.add_argument("--lr", type=float, default=2e-5, help="constant learning rate")
    parser.add_argument("--rows", type=int, default=4, help="rows of an optimizer step")
    parser.add_argument("--validation-sequences", type=int, default=4, help="held-out rows")
    run_cost(parser, measure, show)


if __name__ == "__main__":
    main()
