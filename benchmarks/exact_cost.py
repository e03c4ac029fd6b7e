"""What estimator `exact` costs, for each set of parameters, beside `ghost`: on the same
micro-batches of real rows.

    python -m benchmarks.exact_cost --model models/smollm2 --data DIR/gsm8k_train.jsonl.gz --output
    FILE.json

One process. `plain` is the engine with valuation off; every other case scores, selects half of the
response tokens and trains on them. Each round runs all cases on one micro-batch; ratios are medians
over rounds of ratios within a round. Refreshing (once per optimizer step) is timed apart. Scores
are of G + lambda V in one direction, as with `split_terms: false`; the case `two directions` keeps
G and V apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from alphatoken.config.valuation import ValuationConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.models.scored import scored_depth
from alphatoken.stability.drift import Drift
from alphatoken.values.estimator import Scorer
from alphatoken.values.registry import build_scorer
from benchmarks.measuring import (
    Peak,
    build_trainer,
    circumstances,
    cost_parser,
    flops,
    run_cost,
    seconds,
)


def settings(layers: int) -> dict[str, dict[str, Any]]:
    exact: dict[str, Any] = {"estimator": "exact", "layers": "all", "split_terms": False}
    return {
        "ghost, last 3": {"layers": 3, "split_terms": False},
        f"exact, linears, last {layers // 2}": {**exact, "layers": layers // 2},
        "exact, norms, all layers": {**exact, "parameters": "norms"},
        "exact, linears, all layers": exact,
        "exact, all parameters": {**exact, "parameters": "all"},
        "exact, all parameters, two directions": {
            **exact,
            "parameters": "all",
            "split_terms": True,
        },
    }


class Cases:
    """Everything that is timed, by name; each call takes the number of a micro-batch."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        trainer = build_trainer(arguments, folder)
        self.device = trainer.run.device
        self._engine, self._model = trainer.run.engine, trainer.run.model
        (self._valued,) = self._model.selections
        self._all = replace(self._valued, policy="all")
        self._batches = trainer.feed.training(0).batches
        # They come sorted by length: spread the rounds over all lengths.
        self._picked = np.linspace(0, len(self._batches) - 1, arguments.rounds + 1).astype(int)
        self._held_out = trainer.feed.first_held_out(arguments.validation_sequences)
        decoder = decoder_of(self._model.lm)
        scorers: dict[str, Scorer] = {}
        for name, values in settings(len(decoder.layers)).items():
            config = ValuationConfig.model_validate(values)
            stable = decoder.stable_parameters(
                scored_depth(config.layers, len(decoder.layers)), config.parameters
            )
            ones = {
                key: torch.ones(1).expand(decoder.model.get_parameter(key).ds_shape)
                for key in stable
            }
            scorers[name] = build_scorer(
                decoder, config, self.device, Drift(stable, ones, None, self.device)
            )
        self.calls: dict[str, Callable[[int], None]] = {"plain": self.plain}
        self.calls |= {name: partial(self.valued, scorer) for name, scorer in scorers.items()}
        self.refreshes = {name: partial(self.refresh, scorer) for name, scorer in scorers.items()}

    def plain(self, number: int) -> None:
        self._model.attach(None)
        self._model.selections = (self._all,)
        self._train(number)

    def valued(self, scorer: Scorer, number: int) -> None:
        self._model.attach(scorer)
        self._model.selections = (self._valued,)
        self._train(number)

    def refresh(self, scorer: Scorer) -> None:
        scorer.refresh(self._held_out, 0)

    def _train(self, number: int) -> None:
        total = self._engine(self._batches[self._picked[number]])["total"]
        self._engine.backward(total / 1000, scale_wrt_gas=False)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(arguments, folder)
        peak = Peak(cases.device)
        refreshes: dict[str, float] = {}
        for name, refresh in cases.refreshes.items():
            refresh()
            refreshes[name] = statistics.median(seconds(refresh, cases.device) for _ in range(3))
        for (
            call
        ) in cases.calls.values():  # warm-up: lazy allocations, kernels, DeepSpeed's prefetch trace
            call(0)
        times: dict[str, list[float]] = {name: [] for name in cases.calls}
        for number in range(1, arguments.rounds + 1):
            for name, call in cases.calls.items():
                times[name].append(seconds(partial(call, number), cases.device))
        peaks = {name: peak.of(partial(call, 1)) for name, call in cases.calls.items()}
        operations = {name: flops(partial(call, 1)) for name, call in cases.calls.items()}
    return {
        **circumstances("benchmarks.exact_cost", cases.device, arguments.model),
        "micro_batch": arguments.micro_batch,
        "validation_sequences": arguments.validation_sequences,
        "seconds": times,
        "seconds_of_refresh": refreshes,
        "flops": operations,
        "peak_bytes_above_resident": peaks,
        "ratios": {
            name: {
                "valued / plain": statistics.median(
                    a / b for a, b in zip(own, times["plain"], strict=True)
                ),
                "in FLOPs": operations[name] / operations["plain"],
                "refresh / plain": refreshes[name] / statistics.median(times["plain"]),
            }
            for name, own in times.items()
            if name != "plain"
        },
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        "case",
        "valued / plain, without refresh",
        "in FLOPs",
        "refresh / plain",
        title=result["device"],
    )
    for name, ratios in result["ratios"].items():
        table.add_row(
            name,
            *(f"{ratios[key]:.2f}" for key in ("valued / plain", "in FLOPs", "refresh / plain")),
        )
    Console(width=110).print(table)


def main() -> None:
    parser = cost_parser(__doc__)
    parser.add_argument("--validation-sequences", type=int, default=8)
    parser.set_defaults(split_terms=False)
    run_cost(parser, measure, show)


if __name__ == "__main__":
    main()
