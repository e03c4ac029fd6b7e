"""What the contrast and the halves of values cost, beside the published value: on the same
micro-batches of real rows.

    python -m benchmarks.contrast_cost --model models/smollm2 --data DIR/gsm8k_train.jsonl.gz
    --output FILE.json

One process. Every case scores by `ghost`, trains on half of the response tokens, and has a scorer
of its own. Each round runs all cases on one micro-batch. An optimizer step is the paper's 16
micro-batches, one refresh and what the scorer does after the step; ratios to the published value
are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from alphatoken.config.valuation import ValuationConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.values.estimator import Scorer
from alphatoken.values.registry import build_scorer
from benchmarks.measuring import (
    PAPER_MICRO_BATCHES,
    build_trainer,
    circumstances,
    cost_parser,
    flops,
    run_cost,
    seconds,
)

PUBLISHED = "published value"
SETTINGS: dict[str, dict[str, Any]] = {
    PUBLISHED: {},
    "contrast, scored": {"contrast": 1.0, "contrast_from": "scored"},
    "contrast, drawn": {"contrast": 1.0, "contrast_from": "drawn"},
    "contrast, scored, and halves": {
        "contrast": 1.0,
        "contrast_from": "scored",
        "reliability": True,
    },
    "contrast, drawn, and halves": {"contrast": 1.0, "contrast_from": "drawn", "reliability": True},
}


class Cases:
    """Everything that is timed, by name."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        # Rows know their half in every case; only scorers with halves read it.
        trainer = build_trainer(arguments, folder, reliability=True)
        self.device = trainer.run.device
        self._engine, self._model = trainer.run.engine, trainer.run.model
        self._batches = trainer.feed.training(0).batches
        # They come sorted by length: spread the rounds over all lengths.
        self._picked = np.linspace(0, len(self._batches) - 1, arguments.rounds + 1).astype(int)
        self._held_out = trainer.feed.first_held_out(arguments.validation_sequences)
        # As many rows for B as for G, whatever the configuration of the trainer says.
        rows = trainer.feed.training(1).batches
        self._contrast = rows[: -(-arguments.validation_sequences // arguments.micro_batch)]
        self._own_tokens = sum(int(batch["response"].sum()) for batch in self._batches)
        decoder = decoder_of(self._model.lm)
        self.scorers: dict[str, Scorer] = {}
        for name, values in SETTINGS.items():
            config = ValuationConfig.model_validate(
                {
                    "layers": arguments.layers,
                    "split_terms": arguments.split_terms,
                    "stability_weight": 0.0,
                    **values,
                }
            )
            self.scorers[name] = build_scorer(decoder, config, self.device, drift=None)

    def refresh(self, scorer: Scorer) -> None:
        rows = self._contrast if scorer.needs_contrast_rows else None
        scorer.refresh(self._held_out, self._own_tokens, rows)

    def micro_batch(self, scorer: Scorer, number: int) -> None:
        self._model.attach(scorer)
        total = self._engine(self._batches[self._picked[number]])["total"]
        self._engine.backward(total / 1000, scale_wrt_gas=False)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(arguments, folder)
        times: dict[str, dict[str, list[float]]] = {
            name: {"refresh": [], "micro-batch": [], "after the step": []} for name in SETTINGS
        }

        def take(name: str, number: int) -> dict[str, Callable[[], None]]:
            scorer = cases.scorers[name]
            return {
                "refresh": partial(cases.refresh, scorer),
                "micro-batch": partial(cases.micro_batch, scorer, number),
                "after the step": scorer.after_step,
            }

        # A round before the measured ones: lazy allocations, DeepSpeed's prefetch trace, and the
        # first B of `scored`, which is drawn.
        for number in range(arguments.rounds + 1):
            for name in SETTINGS:
                for part, call in take(name, number).items():
                    took = seconds(call, cases.device)
                    if number:
                        times[name][part].append(took)
        operations = {
            name: {part: flops(call) for part, call in take(name, 1).items()} for name in SETTINGS
        }
    steps = {name: _of_steps(parts) for name, parts in times.items()}
    in_flops = {
        name: _of_steps({part: [count] for part, count in parts.items()})[0]
        for name, parts in operations.items()
    }
    return {
        **circumstances("benchmarks.contrast_cost", cases.device, arguments.model),
        "dtype": arguments.dtype,
        "layers": arguments.layers,
        "micro_batch": arguments.micro_batch,
        "micro_batches_per_step": PAPER_MICRO_BATCHES,
        "validation_sequences": arguments.validation_sequences,
        "seconds": times,
        "flops": operations,
        "ratios": {
            name: {
                "step / published": statistics.median(
                    mine / other for mine, other in zip(own, steps[PUBLISHED], strict=True)
                ),
                "in FLOPs": in_flops[name] / in_flops[PUBLISHED],
            }
            for name, own in steps.items()
        },
    }


def _of_steps(parts: Mapping[str, Sequence[float]]) -> list[float]:
    """What an optimizer step costs, by round."""
    rounds = zip(parts["refresh"], parts["micro-batch"], parts["after the step"], strict=True)
    return [refresh + PAPER_MICRO_BATCHES * batch + after for refresh, batch, after in rounds]


def show(result: dict[str, Any]) -> None:
    table = Table("case", "step / published", "in FLOPs", title=result["device"])
    for name, ratios in result["ratios"].items():
        table.add_row(name, *(f"{number:.3f}" for number in ratios.values()))
    Console(width=110).print(table)


def main() -> None:
    parser = cost_parser(__doc__)
    parser.add_argument("--validation-sequences", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--split-terms", action="store_true", help="keep the terms apart")
    run_cost(parser, measure, show)


if __name__ == "__main__":
    main()
