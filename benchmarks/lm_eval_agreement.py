r"""Our multiple choice beside lm-eval's, on the same rows of HellaSwag: log-likelihoods choice by
choice, and how often the two say the same of an item.

    python recipes/evaluate.py --config configs/evaluation/smollm2.yaml \
        'evaluation.tasks=[{task: multiple_choice, data: {path: DIR/hellaswag_val.jsonl.gz, first: 500}}]' \
        evaluation.output=ours.json
    python -m benchmarks.lm_eval_agreement ours.json --model models/smollm2 \
        --data DIR/hellaswag_val.jsonl.gz --output FILE.json

Contexts and endings go through lm-eval's own cleaning (`lm_eval.tasks.hellaswag`) and its own
scoring (`HFLM.loglikelihood`), in float32. lm-eval's data loading is passed over: it fetches.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphatoken.cli import readable_errors
from alphatoken.config.sections import Source
from alphatoken.data.sources import OpenSource
from alphatoken.errors import UserError
from alphatoken.evaluation.measures import Item
from alphatoken.evaluation.results import read_evaluation
from benchmarks.measuring import circumstances, write_result

DEVICE = torch.device("cpu")


def lm_eval_losses(model: str, rows: list[dict[str, Any]], batch_size: int) -> list[list[float]]:
    """The negative log-likelihood of each ending, as lm-eval finds it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import preprocess

    judge = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch_size)
    requests = [
        Instance("loglikelihood", {}, (preprocess(row["ctx"]), f" {preprocess(ending)}"), place)
        for row in rows
        for place, ending in enumerate(row["endings"])
    ]
    found = iter(judge.loglikelihood(requests))
    return [[-next(found)[0] for _ in row["endings"]] for row in rows]


def agreement(
    ours: Sequence[Item], theirs: list[list[float]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Both accuracies of both, of how many items they say the same, and by how much their numbers
    differ."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    right: dict[str, list[float]] = {"acc_norm": [], "acc": []}
    for row, losses in zip(rows, theirs, strict=True):
        characters = np.array([len(preprocess(ending)) for ending in row["endings"]])
        right["acc_norm"].append(float(np.argmin(losses / characters) == int(row["label"])))
        right["acc"].append(float(np.argmin(losses) == int(row["label"])))
    found: dict[str, Any] = {"items": len(rows)}
    for measure, judged in right.items():
        own = np.array([item[measure] for item in ours])
        found[measure] = float(own.mean())
        found[f"{measure}_lm_eval"] = float(np.mean(judged))
        found[f"{measure}_alike"] = int((own == judged).sum())
    return {
        **found,
        "largest_difference_nats": float(
            np.abs(np.array([item["nll"] for item in ours]) - np.array(theirs)).max()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", type=Path, help="what recipes/evaluate.py wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--skip", type=int, default=0, help="rows left out at the start")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with readable_errors():
        tasks = read_evaluation(arguments.evaluation).tasks.values()
        ours = next((each.items for each in tasks if each.task == "multiple_choice"), None)
        if ours is None:
            raise UserError(f"{arguments.evaluation} has no task multiple_choice")
        source = Source(path=arguments.data, skip=arguments.skip, first=len(ours))
        rows = [row.fields for row in OpenSource(source).raw()]
        theirs = lm_eval_losses(arguments.model, rows, arguments.batch_size)
        found = agreement(ours, theirs, rows)
        print(json.dumps(found))
        if arguments.output:
            about = circumstances("benchmarks.lm_eval_agreement", DEVICE, Path(arguments.model))
            about["versions"]["lm_eval"] = version("lm_eval")
            write_result({**about, **found}, arguments.output)


if __name__ == "__main__":
    main()
