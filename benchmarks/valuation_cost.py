"""What valuation costs: this engine with and without it, and the published procedure, on the same
micro-batches.

    python -m benchmarks.valuation_cost --model models/smollm2 --data DIR/gsm8k_train.jsonl.gz
    --output FILE.json

One process. `plain` is this engine with valuation off; `valued` scores (paper settings: last 3
layers, window 32, but adaptation only), selects half of the tokens and trains on them; `published`
is the paper's procedure as its text describes it: validation sequences appended to every
micro-batch, eager attention returning the weights of all layers, one backward pass for the signals
and a second one, over the retained graph, for the masked loss. In its favour rows are padded to the
longest only, and its head runs on response positions only. Each round runs every variant on the
same micro-batch; the table holds medians, and medians of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken.batch import Batch, loss_positions
from benchmarks.measuring import (
    PAPER_MICRO_BATCHES,
    Peak,
    build_trainer,
    circumstances,
    cost_parser,
    flops,
    run_cost,
    seconds,
)


class Published:
    """The published procedure for one micro-batch, on a plain replica of the model."""

    def __init__(self, model: PreTrainedModel, layers: int, window: int, keep_ratio: float) -> None:
        self._model = model
        self._window = window
        self._keep_ratio = keep_ratio
        depth = model.config.num_hidden_layers
        self._linears = {
            (layer, path): model.model.layers[layer].get_submodule(path)
            for layer in range(depth - layers, depth)
            for path in (
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            )
        }

    def step(
        self, train: list[tuple[Tensor, Tensor]], validation: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Forward of everything, backward for the signals, values, backward of the masked loss."""
        rows = [*train, *validation]
        length = max(len(ids) for ids, _ in rows)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.int64)
        labels_BT = torch.full((len(rows), length), -100)
        for row, (ids, labels) in enumerate(rows):
            ids_BT[row, : len(ids)], labels_BT[row, : len(ids)] = ids, labels
        device = self._model.device
        ids_BT, labels_BT = ids_BT.to(device), labels_BT.to(device)
        response_BT, targets_BT = loss_positions(labels_BT)
        acts: dict[Any, Tensor] = {}
        outputs: dict[Any, Tensor] = {}
        handles = [
            linear.register_forward_hook(
                lambda _module, args, output, key=key: _keep(acts, outputs, key, args, output)
            )
            for key, linear in self._linears.items()
        ]
        result = self._model.model(input_ids=ids_BT, output_attentions=True, use_cache=False)
        for handle in handles:
            handle.remove()
        logits_RV = self._model.lm_head(result.last_hidden_state[response_BT]).float()
        nll_R = torch.nn.functional.cross_entropy(
            logits_RV, targets_BT[response_BT], reduction="none"
        )
        nll_R.sum().backward(retain_graph=True)
        self._model.zero_grad()

        is_train = torch.arange(len(rows), device=device) < len(train)
        scored_BT, held_out_BT = response_BT & is_train[:, None], response_BT & ~is_train[:, None]
        value_R = torch.zeros(int(scored_BT.sum()), device=device)
        for (layer, path), output in outputs.items():
            act, outgrad = acts[layer, path], output.grad
            assert outgrad is not None
            paths = [outgrad[scored_BT]]
            if path.endswith("v_proj"):
                attention_BTT = result.attentions[layer].mean(1)
                banded = attention_BTT.tril(-1) - attention_BTT.tril(-1 - self._window)
                paths.append((banded.transpose(1, 2) @ outgrad)[scored_BT])
            for each in paths:
                products = (each @ outgrad[held_out_BT].T) * (act[scored_BT] @ act[held_out_BT].T)
                value_R += products.float().mean(1)
        kept = value_R.topk(int(self._keep_ratio * len(value_R))).indices
        mask_R = torch.zeros_like(value_R)
        mask_R[kept] = 1
        (nll_R[: len(value_R)] * mask_R).sum().div(len(kept)).backward()  # training rows come first


def _keep(
    acts: dict[Any, Tensor], outputs: dict[Any, Tensor], key: Any, args: Any, output: Tensor
) -> None:
    acts[key] = args[0].detach()
    outputs[key] = output
    output.retain_grad()


class Cases:
    """Everything that is timed, by name; each call takes the number of a micro-batch."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        trainer = build_trainer(arguments, folder)
        self.device = trainer.run.device
        self._engine, self._model = trainer.run.engine, trainer.run.model
        self._scorer = self._model.scorer
        (self._valued,) = self._model.selections
        self._all = replace(self._valued, policy="all")
        self._batches = trainer.feed.training(0).batches
        random.Random(0).shuffle(self._batches)  # they come sorted by length
        self._validation = {
            size: trainer.feed.first_held_out(size) for size in arguments.validation_sequences
        }
        self._own_tokens = sum(int(batch["response"].sum()) for batch in self._batches)
        replica = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16, attn_implementation="eager"
        ).to(self.device)
        self._published = Published(replica, layers=3, window=32, keep_ratio=0.5)
        self.calls: dict[str, Callable[[int], None]] = {"plain": self.plain}
        for size in arguments.validation_sequences:
            self.calls |= {
                f"refresh {size}": partial(self.refresh, size),
                f"valued {size}": self.valued,
                f"published {size}": partial(self.published, size),
            }
        self.calls["optimizer"] = self.optimizer

    def tokens(self, number: int) -> tuple[int, int]:
        """Tokens and response tokens of a micro-batch."""
        batch = self._batches[number]
        return int((batch["document_ids"] >= 0).sum()), int(batch["response"].sum())

    def plain(self, number: int) -> None:
        self._model.attach(None)
        self._model.selections = (self._all,)
        self._train(number)

    def valued(self, number: int) -> None:
        self._model.attach(self._scorer)
        self._model.selections = (self._valued,)
        self._train(number)

    def _train(self, number: int) -> None:
        total = self._engine(self._batches[number])["total"]
        self._engine.backward(total / 1000, scale_wrt_gas=False)

    def refresh(self, size: int, number: int) -> None:
        assert self._scorer is not None
        self._scorer.refresh(self._validation[size], self._own_tokens)

    def published(self, size: int, number: int) -> None:
        held_out = [row for batch in self._validation[size] for row in _rows(batch)]
        self._published.step(_rows(self._batches[number]), held_out)

    def optimizer(self, number: int) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)


def _rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    documents = batch["document_ids"]
    return [
        (ids[inside >= 0], labels[inside >= 0])
        for ids, labels, inside in zip(batch["input_ids"], batch["labels"], documents, strict=True)
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(arguments, folder)
        for (
            call
        ) in cases.calls.values():  # warm-up: lazy allocations, kernels, DeepSpeed's prefetch trace
            call(0)
        times: dict[str, list[float]] = {name: [] for name in cases.calls}
        for number in range(1, arguments.rounds + 1):
            for name, call in cases.calls.items():
                times[name].append(seconds(partial(call, number), cases.device))
        peak = Peak(cases.device)
        peaks = {name: peak.of(partial(call, 1)) for name, call in cases.calls.items()}
        operations = {
            name: flops(partial(call, 1))
            for name, call in cases.calls.items()
            if name != "optimizer"
        }
        tokens = [cases.tokens(number) for number in range(1, arguments.rounds + 1)]
    return {
        **circumstances("benchmarks.valuation_cost", cases.device, arguments.model),
        "micro_batch": arguments.micro_batch,
        "micro_batches_per_step": PAPER_MICRO_BATCHES,
        "max_length": arguments.max_length,
        "split_terms": arguments.split_terms,
        "tokens": tokens,
        "seconds": times,
        "peak_bytes_above_resident": peaks,
        "flops": operations,
        "ratios": {
            str(size): ratios(size, times, operations, peaks)
            for size in arguments.validation_sequences
        },
    }


def ratios(
    size: int, times: dict[str, list[float]], operations: dict[str, int], peaks: dict[str, int]
) -> dict[str, float]:
    """Medians over rounds of ratios within a round, FLOP ratios, and the ratio of peak memory."""
    rounds = [
        costs(dict(zip(times, values, strict=True)), size)
        for values in zip(*times.values(), strict=True)
    ]
    in_flops = costs({**operations, "optimizer": 0}, size)
    ours = max(peaks[f"valued {size}"], peaks[f"refresh {size}"])
    return {
        **{
            name: statistics.median(each[name][0] / each[name][1] for each in rounds)
            for name in rounds[0]
        },
        **{f"{name}, in FLOPs": above / below for name, (above, below) in in_flops.items()},
        "peak memory, valued / published": ours / peaks[f"published {size}"],
    }


def costs(cost: Mapping[str, float], size: int) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each ratio."""
    n = PAPER_MICRO_BATCHES
    valued = n * cost[f"valued {size}"] + cost[f"refresh {size}"]
    return {
        "valued / plain, without refresh": (cost[f"valued {size}"], cost["plain"]),
        "valued / plain, refresh amortised": (valued, n * cost["plain"]),
        "published / valued, optimizer step": (
            n * cost[f"published {size}"] + cost["optimizer"],
            valued + cost["optimizer"],
        ),
    }


def show(result: dict[str, Any]) -> None:
    console = Console(width=110)
    table = Table(
        "case", "median seconds", "TFLOP", "peak MiB above resident", title=result["device"]
    )
    for name, values in result["seconds"].items():
        operations = result["flops"].get(name)
        table.add_row(
            name,
            f"{statistics.median(values):.3f}",
            "" if operations is None else f"{operations / 1e12:.3f}",
            f"{result['peak_bytes_above_resident'][name] / 2**20:.0f}",
        )
    console.print(table)
    table = Table("ratio", *(f"{size} validation sequences" for size in result["ratios"]))
    for name in next(iter(result["ratios"].values())):
        table.add_row(name, *(f"{ratio[name]:.2f}" for ratio in result["ratios"].values()))
    console.print(table)


def main() -> None:
    parser = cost_parser(__doc__)
    parser.add_argument(
        "--validation-sequences",
        type=int,
        nargs="+",
        default=[8, 32],
        help="numbers to measure; the paper has 32",
    )
    parser.add_argument("--split-terms", action="store_true", help="keep the four terms apart")
    run_cost(parser, measure, show)


if __name__ == "__main__":
    main()
