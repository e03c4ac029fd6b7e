"""What `selection.keep_ratio: auto` drops before any step, by the weight of the contrast and by
what B is of.

    python -m benchmarks.dropped --model models/smollm2 --output FILE.json

For rows of each case (`benchmarks.noise`), which are corrupted and never trained on, and for each
c of `--contrasts`: the shares of bad and of good response tokens, and of the summed losses of the
good ones, that are vetoed by a probability below `--veto`, and that `auto` drops besides. Once
with B of all response tokens of other corrupted rows, and once with B of those that are not vetoed.
Where tokens lie in the groups of a run's micro-batches they are here in one group of all rows. One
model, one seed of the corruption; a (case, B, c) takes about a minute of one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken import ValuationConfig, score_tokens
from alphatoken.batch import make_batch
from alphatoken.config.sections import ModelConfig
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.select import Cut, Selection, select
from benchmarks.measuring import circumstances, write_result
from benchmarks.noise import (
    CASES,
    Example,
    Pool,
    marked_tokens,
    not_vetoed,
    read_pool,
    response_losses,
)
from recipes.minimal import padded

SETTINGS: dict[str, Any] = {"layers": 3, "stability_weight": 0.0, "reliability": True}


class Scored:
    """The scored rows of a case, and what is made of their tokens.

    Shape legend: B rows, T positions, R response positions of all rows.
    """

    def __init__(self, model: PreTrainedModel, pool: Pool, pad_token: int, veto: float) -> None:
        self._model = model
        self._pad_token = pad_token
        self._veto = veto
        self._held_out = self._padded(pool.held_out)
        self._columns = self._padded(pool.scored)
        input_ids_BT = self._columns["input_ids"]
        row_B = torch.arange(len(input_ids_BT), device=model.device)
        self._batch = make_batch(
            {**self._columns, "document_ids": row_B[:, None].expand_as(input_ids_BT)}
        )
        self._nll_BT = response_losses(model, self._columns)
        self.bad_R = torch.from_numpy(marked_tokens(pool.scored)[0])
        nll_BT = response_losses(model, self._padded(pool.contrast))
        self.contrast = {
            "all": pool.contrast,
            "not vetoed": not_vetoed(pool.contrast, nll_BT, veto),
        }
        """The rows that B is of, by which of their tokens."""

    def dropped(self, contrast: Sequence[Example], c: float) -> dict[str, float]:
        """The shares that are vetoed, and that `auto` drops besides."""
        config = ValuationConfig(contrast=c, contrast_from="drawn", **SETTINGS)
        rows = self._padded(contrast)
        values = score_tokens(
            self._model, self._columns, self._held_out, contrast=rows, config=config
        )
        assert values.spread is not None, "reliability is on"
        facts = TokenFacts(
            batch=self._batch,
            nll_BT=self._nll_BT,
            protected_BT=torch.zeros_like(self._batch["response"]),
            values={"composite": values.composite, "spread": values.spread},
            contrast=c,
        )
        selection = Selection(
            "top_value",
            Fraction(1),
            veto=Cut(by="probability", threshold=self._veto),
            floor=Cut(by="agreement", threshold=-1.0, in_noise=True),
        )
        choice = select((selection,), facts).choice
        nll_R = facts.response_index.take(self._nll_BT)
        found = {}
        for name, out_R in (("vetoed", choice.vetoed_R), ("harmful", choice.below_R)):
            found[f"{name} of bad"] = _share(out_R[self.bad_R])
            found[f"{name} of good"] = _share(out_R[~self.bad_R])
            good_R = nll_R * ~self.bad_R
            found[f"{name} of the loss of good"] = float((good_R * out_R).sum() / good_R.sum())
        return found

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        documents = [example.document for example in examples]
        return padded(documents, self._pad_token, self._model.device)


def _share(marks_R: Tensor) -> float:
    """Of nothing, 0."""
    return float(marks_R.double().sum()) / max(len(marks_R), 1)


def measure(options: argparse.Namespace) -> None:
    """Writes the result after every number, and prints it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        key: getattr(options, key)
        for key in ("seed", "scored", "contrast", "held_out", "veto", "max_length")
    }
    result: dict[str, Any] = {
        **circumstances("benchmarks.dropped", device, options.model),
        "settings": settings,
        "cases": {},
    }
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(options.model)))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    for name in options.cases:
        pool = read_pool(name, tokenizer, options)
        scored = Scored(model.eval(), pool, tokenizer.pad_token_id, options.veto)
        dropped: list[dict[str, Any]] = []
        result["cases"][name] = {
            "tokens": len(scored.bad_R),
            "bad": _share(scored.bad_R),
            "dropped": dropped,
        }
        for b_of, rows in scored.contrast.items():
            for c in options.contrasts:
                found = {"B of": b_of, "c": c, **scored.dropped(rows, c)}
                dropped.append(found)
                write_result(result, options.output)
                shares = "  ".join(f"{key} {found[key]:.1%}" for key in list(found)[2:])
                print(f"{name}, B of {b_of}, c = {c:g}: {shares}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    problems = [name for name in CASES if name.endswith("problems")]
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the data sets (.jsonl.gz)")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=problems, metavar="CASE")
    parser.add_argument("--contrasts", nargs="+", type=float, default=[0.5, 0.75, 1.0])
    parser.add_argument("--veto", type=float, default=1e-4, help="probability")
    parser.add_argument("--scored", type=int, default=32, help="rows that are scored")
    parser.add_argument("--contrast", type=int, default=32, help="rows of B")
    parser.add_argument("--held-out", type=int, default=32, help="clean rows of G")
    parser.add_argument("--max-length", type=int, default=768, help="longer rows are left out")
    parser.add_argument("--seed", type=int, default=0, help="of rows and corruption")
    options = parser.parse_args(arguments)
    options.train_rows = 8  # a case has rows to train on, which are not used here
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        measure(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
