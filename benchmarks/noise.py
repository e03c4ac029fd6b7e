"""Which rule tells bad tokens from good ones: scoring only, before and while a model is trained on
the same corruption.

    python -m benchmarks.noise measure --model models/smollm2 --data DIR --output FILE.json
    python -m benchmarks.noise table FILE.json

For each case (rows and a corruption of `benchmarks.corruptions`), a float32 model is trained with
AdamW on all tokens of corrupted rows, and after each of `--stages` steps every rule gives other
rows of the same corruption, never trained on, a number per response token:

- **AUROC**: the chance that a bad token's number is lower than a good one's; 0.5 is a coin.
- **bad among the kept half**: the share of bad tokens in the half with the highest numbers, beside
  the share in all.

Both with 95 % intervals by bootstrap over rows, on one model and one corruption seed. Every (case,
stage) is written as it comes; the same command goes on where it was stopped, and other `--cases`
and `--stages` are added to those the file has.

The last two rules without values compare with a second model: the start after `--reference-steps`
on the held-out rows alone.

What is made of values: `G`, the product with the mean gradient of clean held-out rows, is the
published one; `G - B` takes off that with the mean gradient of `--contrast` other corrupted rows
(`valuation.contrast: 1`); `direct` leaves the causal path out; `kinder half` is the higher of the
values under two halves of held-out and contrast rows, so it is low only where both call a token
harmful; `response mean` is the higher of the means over each scored row, one number for all its
tokens (`selection.policy: response_agreement`). `drop_harmful.yaml` is the order in which that
preset drops tokens: first what its veto rules out, then by the kinder half of G - c B, with its c
and with B of what it does not rule out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alphatoken import ValuationConfig, score_tokens
from alphatoken.batch import Batch, make_batch
from alphatoken.config.sections import ModelConfig
from alphatoken.data.batches import Order
from alphatoken.data.chat import EncodedDocument, Encoder, Skipped
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError
from alphatoken.models.decoder import decoder_of
from alphatoken.selection.rules import sequence_means
from benchmarks.corruptions import (
    MarkedRow,
    bad_tokens,
    corrupt,
    human_spans,
    vocabulary_materials,
)
from benchmarks.fidelity import token_losses
from benchmarks.measuring import circumstances, write_result
from benchmarks.studies.rows import PROVIDERS, read_data
from recipes.minimal import padded

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Marks = np.ndarray[Any, np.dtype[np.bool_]]

PRESET = Path(__file__).parents[1] / "configs" / "presets" / "drop_harmful.yaml"

TOP = 20
"""Tokens whose probabilities EAFT takes the entropy of."""

CASES: dict[str, tuple[str, str]] = {
    "junk, GSM8K": ("gsm8k", "junk"),
    "digits, GSM8K": ("gsm8k", "digits"),
    "swapped, GSM8K": ("gsm8k", "swapped"),
    "off target, Dolly in GSM8K": ("gsm8k", "off_target"),
    "clean, problems": ("problems", "none"),
    "junk, problems": ("problems", "junk"),
    "rule, problems": ("problems", "rule"),
    "rule where it is computed, problems": ("problems", "rule_computed"),
    "advertisement, problems": ("problems", "advertisement"),
    "human spans, QA feedback": ("qa_feedback", "spans"),
}
"""Where rows come from, and how they are corrupted."""

CORRUPTED = [name for name, (_, corruption) in CASES.items() if corruption != "none"]
"""Those with bad tokens to find."""


@dataclass(frozen=True)
class Seen:
    """What models say of response tokens, (R,) each."""

    nll_R: Tensor
    entropy_R: Tensor
    """Of the TOP likeliest tokens, their probabilities made to sum to one; nats."""
    start_nll_R: Tensor
    """The loss before training."""
    held_out_nll_R: Tensor
    """The loss of the start trained on the held-out rows alone."""


RULES: dict[str, Callable[[Seen], Tensor]] = {
    "random": lambda seen: torch.rand(seen.nll_R.shape, generator=torch.Generator().manual_seed(0)),
    "highest loss": lambda seen: seen.nll_R,
    "lowest loss (also DFT, ProFit, TALR)": lambda seen: -seen.nll_R,
    "probability at the start (STM)": lambda seen: -seen.start_nll_R,
    "excess loss over the start": lambda seen: seen.nll_R - seen.start_nll_R,
    "fall of the loss since the start (ssToken)": lambda seen: seen.start_nll_R - seen.nll_R,
    "entropy of the top 20 (EAFT)": lambda seen: seen.entropy_R,
    "probability after the held-out rows alone": lambda seen: -seen.held_out_nll_R,
    "excess loss over that (Rho-1)": lambda seen: seen.nll_R - seen.held_out_nll_R,
}
"""Rules without values; all but the last two need no held-out rows. A rule that is a rising
function of p orders tokens as p does."""


def estimators(layers: int) -> dict[str, dict[str, Any]]:
    """Names and `valuation` settings; `layers` is the model's depth."""
    shared: dict[str, Any] = {"stability_weight": 0.0, "contrast": 1.0, "reliability": True}
    ghost, exact = {**shared, "estimator": "ghost"}, {**shared, "estimator": "exact"}
    return {
        "ghost, last 3": {**ghost, "layers": 3},
        "ghost, all layers": {**ghost, "layers": "all"},
        "exact, linears, last half": {**exact, "layers": layers // 2},
        "exact, all parameters": {**exact, "layers": "all", "parameters": "all"},
        PRESET.name: {**shared, **preset_valuation(), "layers": 3},
    }


def preset_valuation() -> dict[str, Any]:
    """The preset's `valuation` settings."""
    settings: dict[str, Any] = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["valuation"]
    return settings


def preset_veto() -> float:
    """The probability below which the preset trains on no token."""
    veto = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["selection"]["veto"]
    assert veto["by"] == "probability", veto
    return float(veto["threshold"])


@dataclass(frozen=True)
class Example:
    """A tokenised row."""

    document: EncodedDocument
    bad: list[bool]
    """Whether each token is bad, cut like the document."""


@dataclass(frozen=True)
class Pool:
    """The rows of a case; none is in two parts."""

    held_out: list[Example]
    scored: list[Example]
    contrast: list[Example]
    train: list[Example]


def read_pool(name: str, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> Pool:
    """Rows of at most `--max-length` tokens, corrupted but for the held-out ones.

    Raises UserError where there are too few.
    """
    source, corruption = CASES[name]
    reserved = options.scored + options.contrast
    wanted = reserved + options.train_rows
    if source == "qa_feedback":
        fields = read_data(options.data, "qa_feedback_spans")
        clean = [MarkedRow(row["prompt"], row["corrected"]) for row in fields[: options.held_out]]
        rows = [human_spans(row) for row in fields[options.held_out :]]
    else:
        sizes = {"held_out": options.held_out, "tuning": 0, "train": wanted, "test": 0}
        parts = PROVIDERS[source].make(sizes, options.seed, options.data)
        materials = vocabulary_materials(tokenizer)
        if corruption == "off_target":
            others = [MarkedRow.from_json(row) for row in read_data(options.data, "dolly_train")]
            materials = replace(materials, others=others)
        clean = [MarkedRow.from_json(row) for row in parts["held_out"]]
        rows = corrupt(
            corruption,
            [MarkedRow.from_json(row) for row in parts["train"]],
            seed=options.seed,
            materials=materials,
        )
    examples = _examples(rows, tokenizer, options.max_length)
    if len(examples) <= reserved:
        raise UserError(
            f"{name}: {len(examples)} rows of at most {options.max_length} tokens are too few for "
            f"--scored {options.scored} --contrast {options.contrast} and some to train on"
        )
    return Pool(
        held_out=_examples(clean, tokenizer, options.max_length),
        scored=examples[: options.scored],
        contrast=examples[options.scored : reserved],
        train=examples[reserved:],
    )


def _examples(
    rows: Sequence[MarkedRow], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    encoder = Encoder(tokenizer, max_length)
    found = []
    for number, row in enumerate(rows):
        encoded = encoder.encode(row.as_json(), where=f"row {number}")
        if not isinstance(encoded, Skipped) and not encoded[0].cut:
            found.append(Example(encoded[0].documents[0], bad_tokens(tokenizer, row)))
    return found


def marked_tokens(examples: Sequence[Example]) -> tuple[Marks, np.ndarray[Any, Any]]:
    """Whether each response token of rows is bad, and the number of its row, (R,) each."""
    bad, rows = [], []
    for number, example in enumerate(examples):
        spoken = example.document.response_mask[1:]
        marks = [mark for mark, own in zip(example.bad[1:], spoken, strict=True) if own]
        bad += marks
        rows += [number] * len(marks)
    return np.array(bad), np.array(rows)


@torch.no_grad()
def response_losses(model: PreTrainedModel, columns: Mapping[str, Tensor]) -> Tensor:
    """Losses of rows that are padded on the right, (B, T), zero off the response; those of a token
    lie at the position before it."""
    labelled = {"input_ids": columns["input_ids"], "labels": columns["labels"]}
    batch = make_batch(labelled)
    return batch["response_index"].put(token_losses(decoder_of(model), batch))


def not_vetoed(examples: Sequence[Example], nll_BT: Tensor, veto: float) -> list[Example]:
    """Rows whose tokens with a probability below `veto` are read, but are no response tokens.

    nll_BT: their `response_losses`.
    """
    limit, spared = -math.log(veto), []
    for example, nll_T in zip(examples, nll_BT.tolist(), strict=True):
        document = example.document
        # Position t has the loss of token t + 1. The first token has none.
        losses = [0.0, *nll_T]
        mask = [
            own and loss <= limit
            for own, loss in zip(document.response_mask, losses, strict=False)  # padding
        ]
        spared.append(replace(example, document=replace(document, response_mask=mask)))
    return spared


class Measured:
    """A model in training, and what rules say of its tokens.

    Shape legend: B rows, T positions, V vocabulary, R response positions of all scored rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: Pool,
        pad_token: int,
        *,
        micro_batch: int,
        lr: float,
        reference_steps: int,
        rows_per_step: int,
    ) -> None:
        self.model = model
        self._pool = pool
        self._pad_token = pad_token
        self._micro_batch = micro_batch
        self._start_nll_R, _ = self._losses_and_entropies(model)
        of_held_out = copy.deepcopy(model)
        order = Order([len(pool.held_out)], None, seed=(0, 0))
        steps = (order.step(step, rows_per_step) for step in range(reference_steps))
        self._take_steps(of_held_out, self._adamw(of_held_out, lr), pool.held_out, steps)
        self._held_out_nll_R, _ = self._losses_and_entropies(of_held_out)
        self._optimizer = self._adamw(model, lr)

    def tokens(self) -> tuple[Marks, np.ndarray[Any, Any]]:
        """Whether each scored token is bad, and the number of its row, (R,) each."""
        return marked_tokens(self._pool.scored)

    def seen(self) -> Seen:
        """What rules without values are made of."""
        nll_R, entropy_R = self._losses_and_entropies(self.model)
        return Seen(nll_R, entropy_R, self._start_nll_R, self._held_out_nll_R)

    @torch.no_grad()
    def _losses_and_entropies(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        losses, entropies = [], []
        for batch in self._batches(self._pool.scored):
            logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
            logits_RV = logits_BTV[batch["response"]].float()
            targets_R = batch["targets"][batch["response"]]
            losses.append(torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none"))
            top_RV = logits_RV.topk(min(TOP, logits_RV.shape[1])).values.log_softmax(-1)
            entropies.append(-(top_RV.exp() * top_RV).sum(-1))
        return torch.cat(losses).cpu(), torch.cat(entropies).cpu()

    def values(self, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """The values of an estimator by what is made of them, (R,) each."""
        target, against = ("direct_target", "causal_target"), ("direct_contrast", "causal_contrast")
        names = [*target, *against, "spread"]
        terms = self._terms(ValuationConfig.model_validate(settings), names, self._pool.contrast)
        both_R = terms["direct_target"] + terms["causal_target"]
        value_R = both_R - terms["direct_contrast"] - terms["causal_contrast"]
        row_R = torch.from_numpy(self.tokens()[1])
        spread_S = sequence_means(terms["spread"], row_R)
        made = {
            "G": both_R,
            "G - B": value_R,
            "G - B, kinder half": value_R + terms["spread"].abs(),
            "G - B, response mean": (sequence_means(value_R, row_R) + spread_S.abs())[row_R],
        }
        if settings["estimator"] == "ghost":  # exact does not tell the paths apart
            made["G, direct"] = terms["direct_target"]
            made["G - B, direct"] = terms["direct_target"] - terms["direct_contrast"]
        return made

    def preset_order(self, settings: Mapping[str, Any]) -> Tensor:
        """Numbers, (R,), by which the preset drops the lowest first: what it vetoes, all alike,
        then by the kinder half of values with B of what is not vetoed."""
        veto = preset_veto()
        nll_BT = response_losses(self.model, self._whole(self._pool.contrast))
        contrast = not_vetoed(self._pool.contrast, nll_BT, veto)
        config = ValuationConfig.model_validate(settings)
        terms = self._terms(config, ["composite", "spread"], contrast)
        kinder_R = terms["composite"] + terms["spread"].abs()
        nll_R, _ = self._losses_and_entropies(self.model)
        return kinder_R.where(nll_R <= -math.log(veto), kinder_R.new_tensor(-math.inf))

    def _terms(
        self, config: ValuationConfig, names: Sequence[str], contrast: Sequence[Example]
    ) -> dict[str, Tensor]:
        """Terms of every scored token, (R,) each."""
        scored = self._whole(self._pool.scored)
        held_out, against = self._whole(self._pool.held_out), self._whole(contrast)
        # One call for all: each forms the mean gradients of held-out and contrast rows anew.
        values = score_tokens(self.model, scored, held_out, contrast=against, config=config)
        response_BT = make_batch(scored)["response"]
        return {name: getattr(values, name)[response_BT].float().cpu() for name in names}

    def train(self, order: Order, steps: range, rows_per_step: int) -> None:
        """Takes optimizer steps on all tokens."""
        taken = (order.step(step, rows_per_step) for step in steps)
        self._take_steps(self.model, self._optimizer, self._pool.train, taken)

    def _take_steps(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        rows: Sequence[Example],
        steps: Iterable[Iterable[int]],
    ) -> None:
        decoder = decoder_of(model)
        model.train()
        for indices in steps:
            own = [rows[index] for index in indices]
            count = sum(sum(row.document.response_mask[1:]) for row in own)
            for batch in self._batches(own):
                (token_losses(decoder, batch).sum() / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    @staticmethod
    def _adamw(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def _whole(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Rows as one batch."""
        documents = [row.document for row in rows]
        return padded(documents, self._pad_token, self.model.device)

    def _padded(self, rows: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), self._micro_batch):
            documents = [row.document for row in rows[start : start + self._micro_batch]]
            yield padded(documents, self._pad_token, self.model.device)

    def _batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        for columns in self._padded(rows):  # padding is on the right, so no mask is needed
            yield make_batch({"input_ids": columns["input_ids"], "labels": columns["labels"]})


class Ordered:
    """Tokens in the order of a rule, and which of them are bad."""

    def __init__(self, value_R: Numbers, bad_R: Marks, row_R: np.ndarray[Any, Any]) -> None:
        _, self._level_R = np.unique(value_R, return_inverse=True)
        self._best_first_R = np.argsort(-value_R, kind="stable")
        self._bad_R = bad_R
        self._row_R = row_R

    def measures(self, multiplicity: Numbers) -> tuple[float, float]:
        """AUROC and the share of bad tokens in the best half, each row counted as often as is
        said; NaN without both kinds of tokens."""
        weight_R = multiplicity[self._row_R]
        bad_L = np.bincount(self._level_R, weight_R * self._bad_R)
        good_L = np.bincount(self._level_R, weight_R * ~self._bad_R)
        bad, good = bad_L.sum(), good_L.sum()
        if not (bad and good):
            return float("nan"), float("nan")
        higher_L = good - good_L.cumsum()
        auroc = float((bad_L * (higher_L + good_L / 2)).sum() / (bad * good))
        ordered_R = weight_R[self._best_first_R]
        before_R = ordered_R.cumsum() - ordered_R
        half = (bad + good) / 2
        kept_R = np.clip(half - before_R, 0, ordered_R)
        return auroc, float((kept_R * self._bad_R[self._best_first_R]).sum() / half)


def with_intervals(
    value_R: Tensor, bad_R: Marks, row_R: np.ndarray[Any, Any], draws: int
) -> dict[str, list[float]]:
    """Both measures as [value, lower, upper], 95 % by bootstrap over rows."""
    ordered = Ordered(value_R.double().numpy(), bad_R, row_R)
    rows = int(row_R.max()) + 1
    rng = np.random.default_rng(0)
    drawn = [
        ordered.measures(np.bincount(rng.integers(0, rows, rows), minlength=rows).astype(float))
        for _ in range(draws)
    ]
    bounds = np.nanpercentile(np.array(drawn), [2.5, 97.5], axis=0)
    measured = ordered.measures(np.ones(rows))
    return {
        name: [measured[place], float(bounds[0, place]), float(bounds[1, place])]
        for place, name in enumerate(("auroc", "bad_among_kept"))
    }


def measure(options: argparse.Namespace) -> None:
    """Adds every (case, stage) that the result does not have yet."""
    result = opened(options)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(options.model)))
    for name in options.cases:
        case = result["cases"].setdefault(name, {"stages": {}})
        missing = [stage for stage in options.stages if str(stage) not in case["stages"]]
        if not missing:
            continue
        pool = read_pool(name, tokenizer, options)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        measured = Measured(
            model.to(device).eval(),
            pool,
            tokenizer.pad_token_id,
            micro_batch=options.micro_batch,
            lr=options.lr,
            reference_steps=options.reference_steps,
            rows_per_step=options.rows_per_step,
        )
        bad_R, row_R = measured.tokens()
        case |= {"tokens": len(bad_R), "bad": float(bad_R.mean())}
        order = Order([len(pool.train)], None, seed=(options.seed, 0))
        done = 0
        for stage in sorted(missing):
            measured.train(order, range(done, stage), options.rows_per_step)
            done = stage
            case["stages"][str(stage)] = {
                rule: with_intervals(value_R, bad_R, row_R, options.bootstrap)
                for rule, value_R in all_values(measured, options.estimators)
            }
            write_result(result, options.output)
            print(f"{name}, after {stage} steps: written", flush=True)


def all_values(measured: Measured, chosen: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    """What every rule and estimator sorts the scored tokens by, (R,) each."""
    seen = measured.seen()
    for name, rule in RULES.items():
        yield name, rule(seen)
    depth = len(decoder_of(measured.model).layers)
    for name, settings in estimators(depth).items():
        if chosen is not None and name not in chosen:
            continue
        if name == PRESET.name:
            yield name, measured.preset_order(settings)
        else:
            for made, value_R in measured.values(settings).items():
                yield f"{name}: {made}", value_R


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """The result so far. Raises UserError where it was made with other settings."""
    settings = {
        key: getattr(options, key)
        for key in (
            "seed",
            "scored",
            "contrast",
            "held_out",
            "train_rows",
            "rows_per_step",
            "lr",
            "reference_steps",
            "max_length",
            "bootstrap",
            "estimators",
        )
    }
    if options.output.exists():
        result: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        changed = [key for key, value in settings.items() if result["settings"].get(key) != value]
        if changed:
            raise UserError(
                f"{options.output} was made with other settings ({', '.join(changed)}): give "
                "another --output, or the same settings"
            )
        return result
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = circumstances("benchmarks.noise", device, options.model)
    return {**about, "settings": settings, "cases": {}}


def markdown(result: Mapping[str, Any]) -> str:
    """A table per case: AUROC and bad among the kept half, stage by stage."""
    lines = []
    for name, case in result["cases"].items():
        stages = case["stages"]
        titles = [f"AUROC, {stage} steps | bad kept, {stage} steps" for stage in stages]
        lines += [
            f"## {name}",
            "",
            f"{case['tokens']} tokens, {case['bad']:.3f} of them bad.",
            "",
            f"| rule | {' | '.join(titles)} |",
            "| --- |" + " --- | --- |" * len(stages),
        ]
        for rule in next(iter(stages.values())):
            cells = [_cell(measures[rule]) for measures in stages.values()]
            lines.append(f"| {rule} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(measures: Mapping[str, Sequence[float]]) -> str:
    value, low, high = measures["auroc"]
    kept, kept_low, kept_high = measures["bad_among_kept"]
    return f"{value:.2f} ({low:.2f}..{high:.2f}) | {kept:.3f} ({kept_low:.3f}..{kept_high:.3f})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="print a result as Markdown")
    table.add_argument("result", type=Path)
    own = commands.add_parser("measure", help="measure, or go on measuring")
    own.add_argument("--model", type=Path, required=True)
    own.add_argument("--data", type=Path, help="folder of the data sets (.jsonl.gz)")
    own.add_argument("--output", type=Path, required=True, help="JSON")
    own.add_argument("--cases", nargs="+", choices=CORRUPTED, default=CORRUPTED, metavar="CASE")
    own.add_argument("--estimators", nargs="+", metavar="NAME", help="some of them; default: all")
    own.add_argument("--stages", nargs="+", type=int, default=[0, 20, 60], help="steps")
    own.add_argument("--scored", type=int, default=48, help="rows that are scored")
    own.add_argument("--contrast", type=int, default=32, help="rows of B")
    own.add_argument("--held-out", type=int, default=32, help="clean rows of G")
    own.add_argument(
        "--train-rows", type=int, default=480, help="rows to train on; more steps see them again"
    )
    own.add_argument("--rows-per-step", type=int, default=8)
    own.add_argument("--micro-batch", type=int, default=4)
    own.add_argument("--lr", type=float, default=1e-4)
    own.add_argument(
        "--reference-steps",
        type=int,
        default=30,
        help="steps that make the reference of Rho-1 out of the start, on the held-out rows alone",
    )
    own.add_argument("--max-length", type=int, default=768, help="longer rows are left out")
    own.add_argument("--bootstrap", type=int, default=1000)
    own.add_argument("--seed", type=int, default=0, help="of rows, corruption and order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.command == "measure":
            measure(options)
        else:
            print(markdown(json.loads(options.result.read_text(encoding="utf-8"))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
