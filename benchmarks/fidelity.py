"""What values are worth: every estimator against explicit per-token gradients and against real
optimizer steps.

    python -m benchmarks.fidelity --model models/smollm2 --data DIR/gsm8k_train.jsonl.gz --output
    FILE.json

One process, a copy of the model in float32 as the truth and one in bf16 for the estimators, both
with the same (bf16) weights. Rows of at most `--max-length` tokens are taken in order: first the
validation sequences, then the responses, then those of AdamW's warm-up (which has no weight decay).

- **Token truth.** <grad l_t, G> over all parameters for every response token, one backward pass
  each, G the gradient of the validation loss. For every estimator and baseline policy: the rank
  correlation (Spearman) with the truth, and the value captured, the truth of the tokens it would
  keep over that of the best ones; within sequences, within micro-batches, and over all tokens.
  Intervals: 95 %, by bootstrap over sequences.
- **Step truth.** With the moments of AdamW some steps into training: how much the validation loss
  after one more step rises when a group of tokens (half a response) is left out of it, measured,
  for SGD and for AdamW. Beside it the rank correlation of each estimator's sum over the group.
- **Cost.** Seconds of a scoring pass over those of a plain training step on the same rows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken.batch import Batch, make_batch, to_device
from alphatoken.config.sections import Source
from alphatoken.config.valuation import ValuationConfig
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoder
from alphatoken.distributed.adam_scale import adam_scale
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.head import head_nll
from alphatoken.training.moments import rank_correlation
from alphatoken.values.registry import build_scorer
from benchmarks.measuring import circumstances, write_result

SCOPES = ("sequence", "micro_batch", "global_batch")


def estimators(layers: int) -> dict[str, dict[str, Any]]:
    """Names and `valuation` settings; `layers` is the model's depth."""
    half = layers // 2
    ghost: dict[str, Any] = {"estimator": "ghost"}
    exact: dict[str, Any] = {"estimator": "exact"}
    return {
        "ghost, last 3 (published)": {**ghost, "layers": 3},
        "ghost, last 3, direct only": {**ghost, "layers": 3, "window": 0},
        f"ghost, last {half}": {**ghost, "layers": half},
        "ghost, all layers": {**ghost, "layers": "all"},
        "exact, linears, last 3": {**exact, "layers": 3},
        f"exact, linears, last {half}": {**exact, "layers": half},
        "exact, linears, all layers": {**exact, "layers": "all"},
        "exact, norms, all layers": {**exact, "layers": "all", "parameters": "norms"},
        f"exact, all parameters, last {half}": {**exact, "layers": half, "parameters": "all"},
        "exact, all parameters": {**exact, "layers": "all", "parameters": "all"},
        "exact, all parameters, adam": {
            **exact,
            "layers": "all",
            "parameters": "all",
            "preconditioner": "adam",
        },
    }


@dataclass
class Rows:
    """The rows to value, a batch for each micro-batch, and the held-out ones."""

    train: list[Batch]
    validation: list[Batch]
    warm_up: list[Batch]

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(micro-batch, row) of every sequence."""
        return [
            (number, row)
            for number, batch in enumerate(self.train)
            for row in range(len(batch["input_ids"]))
        ]


def read_rows(arguments: argparse.Namespace, device: torch.device) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset: TokenDataset = tokenise(
        [Source(path=str(arguments.data))], Encoder(tokenizer, 4096), arguments.cache
    )
    fitting = np.flatnonzero(dataset.lengths <= arguments.max_length)
    layout = Layout(arguments.micro_batch, tokenizer.pad_token_id)

    def taken(start: int, count: int) -> list[Batch]:
        batches = micro_batches(dataset, fitting[start : start + count], layout, 0, 1)
        return [to_device(batch, device) for batch in batches]

    held_out = arguments.validation_sequences
    warm_up = arguments.warm_up_steps * arguments.micro_batch
    needed = held_out + arguments.responses + warm_up
    if len(fitting) < needed:
        sys.exit(
            f"{arguments.data} has {len(fitting)} rows of at most {arguments.max_length} tokens, "
            f"not {needed}"
        )
    return Rows(
        validation=taken(0, held_out),
        train=taken(held_out, arguments.responses),
        warm_up=taken(held_out + arguments.responses, warm_up),
    )


def token_losses(decoder: Decoder, batch: Batch) -> Tensor:
    """Losses of the response positions, (R,)."""
    response_BT, targets_BT = batch["response"], batch["targets"]
    hidden_RH, head = decoder.hidden_states(batch)[response_BT], decoder.head
    return head_nll(
        hidden_RH, head.weight, head.bias, targets_BT[response_BT], decoder.logit_softcap
    )


class Truth:
    """A float32 model with whole gradients."""

    def __init__(self, model: PreTrainedModel, rows: Rows) -> None:
        self.model = model
        self.rows = rows
        self._decoder = decoder_of(model)
        self.parameters = dict(model.named_parameters())
        self._validation_tokens = sum(int(batch["response"].sum()) for batch in rows.validation)

    def losses(self, batch: Batch) -> Tensor:
        return token_losses(self._decoder, batch)

    def gradient(self, loss: Tensor, *, keep_graph: bool = False) -> list[Tensor]:
        return list(
            torch.autograd.grad(loss, list(self.parameters.values()), retain_graph=keep_graph)
        )

    @torch.no_grad()
    def validation_loss(self) -> float:
        total = sum(float(self.losses(batch).double().sum()) for batch in self.rows.validation)
        return total / self._validation_tokens

    def validation_gradient(self) -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        for batch in self.rows.validation:
            for sum_so_far, each in zip(
                total, self.gradient(self.losses(batch).sum()), strict=True
            ):
                sum_so_far += each / self._validation_tokens
        return total

    def token_values(self) -> list[list[Tensor]]:
        """<grad l_t, G> of every response token: per micro-batch and row, (R,)."""
        direction = self.validation_gradient()
        values = []
        for batch in track(self.rows.train, "per-token gradients"):
            rows = []
            for row in range(len(batch["input_ids"])):
                losses_R = self.losses(one_row(batch, row))
                own = [dot(self.gradient(loss, keep_graph=True), direction) for loss in losses_R]
                rows.append(torch.tensor(own))
            values.append(rows)
        return values


def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(
        float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(first, second, strict=True)
    )


def one_row(batch: Batch, row: int) -> Batch:
    """A single sequence without padding."""
    inside_T = batch["document_ids"][row] >= 0
    return make_batch(
        {
            "input_ids": batch["input_ids"][row : row + 1, inside_T],
            "labels": batch["labels"][row : row + 1, inside_T],
        }
    )


def estimate(
    model: PreTrainedModel,
    rows: Rows,
    settings: dict[str, Any],
    scale: Callable[[nn.Parameter], Tensor],
) -> tuple[list[list[Tensor]], dict[str, float]]:
    """Values like `Truth.token_values`, and the seconds of refresh and of scoring (all
    micro-batches)."""
    config = ValuationConfig.model_validate(settings)
    decoder = decoder_of(model)
    scorer = build_scorer(decoder, config, model.device, None, scale)
    own_tokens = sum(int(batch["response"].sum()) for batch in rows.train)
    with timed() as refresh:
        scorer.refresh(rows.validation, own_tokens)
    values, seconds = [], 0.0
    for batch in rows.train:
        with torch.no_grad(), scorer.capture() as capture:
            decoder.hidden_states(batch)
        with timed() as scoring:
            composite_BT = scorer.score(capture.entry, batch).values.composite
        seconds += scoring[0]
        values.append(by_row(composite_BT, batch))
    return values, {"refresh": refresh[0], "score": seconds}


@contextmanager
def timed() -> Iterator[list[float]]:
    elapsed = [0.0]
    began = time.perf_counter()
    yield elapsed
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed[0] = time.perf_counter() - began


def by_row(value_BT: Tensor, batch: Batch) -> list[Tensor]:
    response_BT = batch["response"]
    return [
        value_T[response_T].float().cpu()
        for value_T, response_T in zip(value_BT, response_BT, strict=True)
    ]


def baselines(truth: Truth, seed: int) -> dict[str, list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with torch.no_grad():
        for batch in truth.rows.train:
            nll_BT = torch.zeros(batch["labels"].shape, device=batch["labels"].device)
            nll_BT[batch["response"]] = truth.losses(batch)
            losses.append(by_row(nll_BT, batch))
    return {
        "policy loss": losses,
        "policy low_perplexity": [[-row for row in rows] for rows in losses],
        "policy random": [
            [torch.rand(row.shape, generator=generator) for row in rows] for rows in losses
        ],
    }


def plain_step_seconds(model: PreTrainedModel, rows: Rows) -> float:
    """Forward and backward of the mean loss of every response token, all micro-batches; gradients
    are dropped."""
    decoder = decoder_of(model)
    token_losses(decoder, rows.train[0]).mean().backward()  # warm-up
    with timed() as plain:
        for batch in rows.train:
            token_losses(decoder, batch).mean().backward()
    model.zero_grad(set_to_none=True)
    return plain[0]


def fidelity(
    truth: list[Tensor], values: list[Tensor], groups: list[list[int]], keep_ratio: Fraction
) -> tuple[float, float]:
    """Rank correlation, a mean over groups by tokens, and the value captured over all groups."""
    correlation = weight = kept = best = 0.0
    for group in groups:
        true_R, value_R = (torch.cat([each[place] for place in group]) for each in (truth, values))
        correlation += len(true_R) * rank_correlation(true_R, value_R)
        weight += len(true_R)
        count = math.ceil(keep_ratio * len(true_R))
        kept += float(true_R[value_R.argsort(descending=True, stable=True)[:count]].sum())
        best += float(true_R.sort(descending=True).values[:count].sum())
    return correlation / weight, kept / best


def with_interval(
    measure: Callable[[list[int]], Sequence[float]], count: int, draws: int, seed: int
) -> list[Any]:
    """Per number that `measure` gives for drawn places: [value, lower, upper], 95 % by bootstrap
    over the places."""
    rng = np.random.default_rng(seed)
    values = measure(list(range(count)))
    drawn = np.array(
        [measure(sorted(rng.integers(0, count, count).tolist())) for _ in range(draws)]
    )
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [
        [value, float(low), float(high)] for value, low, high in zip(values, *bounds, strict=True)
    ]


def token_table(
    truth: list[list[Tensor]],
    found: dict[str, list[list[Tensor]]],
    rows: Rows,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """By estimator and scope: rank correlation and value captured, each with its interval."""
    table: dict[str, Any] = {}
    flat_truth = [row for batch in truth for row in batch]
    batch_of = [number for number, _ in rows.sequences]
    for name, values in found.items():
        flat = [row for batch in values for row in batch]
        table[name] = {}
        for scope in SCOPES:

            def of_drawn(
                places: list[int], scope: str = scope, flat: list[Tensor] = flat
            ) -> tuple[float, float]:
                members: dict[int, list[int]] = {}
                for position, place in enumerate(places):
                    key = {"sequence": position, "micro_batch": batch_of[place], "global_batch": 0}[
                        scope
                    ]
                    members.setdefault(key, []).append(place)
                return fidelity(flat_truth, flat, list(members.values()), arguments.keep_ratio)

            correlation, captured = with_interval(of_drawn, len(flat), arguments.bootstrap, seed=1)
            table[name][scope] = {"rank correlation": correlation, "value captured": captured}
    return table


class Optimizers:
    """SGD and AdamW from one state, and the validation loss that a step from there leads to."""

    def __init__(self, truth: Truth, arguments: argparse.Namespace) -> None:
        self._truth = truth
        self._lr = {"sgd": arguments.sgd_lr, "adamw": arguments.adamw_lr}
        parameters = list(truth.parameters.values())
        self._betas, self._eps = (0.9, 0.999), 1e-8
        self._mean = [torch.zeros_like(parameter) for parameter in parameters]
        self._square = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = 0
        for batch in track(truth.rows.warm_up, "warm-up of AdamW"):
            losses_R = truth.losses(batch)
            self._step("adamw", truth.gradient(losses_R.mean()), keep=True)
        with torch.no_grad():  # to weights that a bf16 model can have: the estimators' is one
            for parameter in parameters:
                parameter.copy_(parameter.bfloat16())

    @torch.no_grad()
    def _step(self, kind: str, gradient: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """Moves the weights; returns what they were."""
        before = [parameter.detach().clone() for parameter in self._truth.parameters.values()]
        beta1, beta2 = self._betas
        steps = self.steps + 1
        for parameter, each, mean, square in zip(
            self._truth.parameters.values(), gradient, self._mean, self._square, strict=True
        ):
            if kind == "sgd":
                parameter -= self._lr[kind] * each
                continue
            new_mean = beta1 * mean + (1 - beta1) * each
            new_square = beta2 * square + (1 - beta2) * each.square()
            scale = adam_scale(new_square, steps, beta2, self._eps)
            parameter -= self._lr[kind] * new_mean / (1 - beta1**steps) * scale
            if keep:
                mean.copy_(new_mean)
                square.copy_(new_square)
        self.steps = steps if keep else self.steps
        return before

    def loss_after(self, kind: str, gradient: Sequence[Tensor]) -> float:
        """Validation loss after one step from this state, which is left as it was."""
        before = self._step(kind, gradient, keep=False)
        loss = self._truth.validation_loss()
        with torch.no_grad():
            for parameter, old in zip(self._truth.parameters.values(), before, strict=True):
                parameter.copy_(old)
        return loss

    def scale(self, name: str) -> Tensor:
        """What AdamW multiplies a named parameter's gradient by, flat."""
        place = list(self._truth.parameters).index(name)
        return adam_scale(self._square[place].flatten(), self.steps, self._betas[1], self._eps)


def step_truth(truth: Truth, optimizers: Optimizers) -> dict[str, list[float]]:
    """By optimizer: the rise of the validation loss when each half response is left out of the
    step."""
    rows, tokens = truth.rows, 0
    total = [torch.zeros_like(parameter) for parameter in truth.parameters.values()]
    for batch in rows.train:
        losses_R = truth.losses(batch)
        tokens += len(losses_R)
        for sum_so_far, each in zip(total, truth.gradient(losses_R.sum()), strict=True):
            sum_so_far += each
    rises: dict[str, list[float]] = {"sgd": [], "adamw": []}
    whole = {kind: optimizers.loss_after(kind, [each / tokens for each in total]) for kind in rises}
    for number, row in track(rows.sequences, "steps without a group"):
        losses_R = truth.losses(one_row(rows.train[number], row))
        halves = losses_R.tensor_split(2)
        gradients = [
            truth.gradient(part.sum(), keep_graph=True) for part in halves
        ]  # before the weights move
        for left_out in gradients:
            without = [(a - b) / tokens for a, b in zip(total, left_out, strict=True)]
            for kind in rises:
                rises[kind].append(optimizers.loss_after(kind, without) - whole[kind])
    return rises


def step_table(
    rises: dict[str, list[float]],
    found: dict[str, list[list[Tensor]]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """By estimator and optimizer: rank correlation of summed values with the measured rise, with
    its interval."""
    table: dict[str, Any] = {}
    for name, values in found.items():
        sums = [
            float(part.sum()) for batch in values for row in batch for part in row.tensor_split(2)
        ]
        table[name] = {}
        for kind, measured in rises.items():

            def of_drawn(
                places: list[int], measured: list[float] = measured, sums: list[float] = sums
            ) -> tuple[float]:
                pairs = [
                    index for place in places for index in (2 * place, 2 * place + 1)
                ]  # halves stay together
                return (rank_correlation(torch.tensor(measured)[pairs], torch.tensor(sums)[pairs]),)

            (table[name][kind],) = with_interval(
                of_drawn, len(sums) // 2, arguments.bootstrap, seed=2
            )
    return table


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_rows(arguments, device)
    full = (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(device).eval()
    )
    truth = Truth(full, rows)
    optimizers = Optimizers(truth, arguments)
    # The estimators see the weights that the truth is about, rounded.
    coarse = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    )
    coarse = coarse.to(device).eval()
    coarse.load_state_dict(full.state_dict())
    by_identity = {id(parameter): name for name, parameter in coarse.named_parameters()}
    found, costs = {}, {}
    for name, settings in estimators(len(decoder_of(coarse).layers)).items():
        print(f"{name} ...", flush=True)
        found[name], costs[name] = estimate(
            coarse, rows, settings, lambda parameter: optimizers.scale(by_identity[id(parameter)])
        )
    plain = plain_step_seconds(coarse, rows)
    found |= baselines(truth, seed=0)
    rises = step_truth(truth, optimizers)
    values = truth.token_values()
    found_with_truth = {**found, "per-token gradients": values}
    return {
        **circumstances("benchmarks.fidelity", device, arguments.model),
        "dtype": arguments.dtype,
        "responses": len(rows.sequences),
        "response_tokens": sum(len(row) for batch in values for row in batch),
        "validation_sequences": arguments.validation_sequences,
        "warm_up_steps": optimizers.steps,
        "keep_ratio": float(arguments.keep_ratio),
        "seconds_of_plain_steps": plain,
        "seconds": costs,
        "tokens": token_table(values, found, rows, arguments),
        "steps": step_table(rises, found_with_truth, arguments),
        "measured_rises": rises,
    }


def show(result: dict[str, Any]) -> None:
    def cell(interval: Sequence[float]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)

    console = Console(width=170)
    title = (
        f"{result['response_tokens']} tokens of {result['responses']} responses, {result['model']}"
    )
    heads = [
        f"{what}, {scope}"
        for scope in ("micro_batch", "sequence")
        for what in ("rank correlation", "captured")
    ]
    table = Table("token truth", *heads, "score / plain step", title=title)
    for name, scopes in result["tokens"].items():
        cells = [
            cell(scopes[scope][what])
            for scope in ("micro_batch", "sequence")
            for what in ("rank correlation", "value captured")
        ]
        cost = result["seconds"].get(name)
        table.add_row(
            name,
            *cells,
            "" if cost is None else f"{cost['score'] / result['seconds_of_plain_steps']:.2f}",
        )
    console.print(table)
    table = Table("step truth: rank correlation with the measured rise", "SGD", "AdamW")
    for name, kinds in result["steps"].items():
        table.add_row(name, cell(kinds["sgd"]), cell(kinds["adamw"]))
    console.print(table)


def plot(result: dict[str, Any], file: Path) -> None:
    """Fidelity against cost."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, cost in result["seconds"].items():
        value, low, high = result["tokens"][name]["micro_batch"]["rank correlation"]
        x = cost["score"] / result["seconds_of_plain_steps"]
        marker = "o" if name.startswith("ghost") else "s"
        axes.errorbar(
            x, value, yerr=[[value - low], [high - value]], fmt=marker, capsize=3, label=name
        )
    axes.set_xlabel("time of a scoring pass / time of a plain training step")
    axes.set_ylabel("rank correlation with per-token gradients")
    axes.set_title(f"{result['model']}: fidelity of token values against their cost")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows {prompt, response}")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; the plot lies beside it as .png"
    )
    parser.add_argument("--responses", type=int, default=20)
    parser.add_argument("--validation-sequences", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=144, help="longer rows are left out")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--keep-ratio", type=Fraction, default=Fraction(1, 2))
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the estimators' model",
    )
    parser.add_argument(
        "--warm-up-steps", type=int, default=8, help="of AdamW, before anything is measured"
    )
    parser.add_argument("--adamw-lr", type=float, default=2e-5)
    parser.add_argument("--sgd-lr", type=float, default=2e-3)
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/alphatoken"))
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    write_result(result, arguments.output)
    plot(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
