"""One run of a study, in a process of its own: trains by the library's own code, then measures.

    python -m benchmarks.studies.job FOLDER

`benchmarks.study` writes FOLDER/job.json and starts this; what comes out is FOLDER/result.json,
which is there whole or not at all. Everything else in FOLDER but log, settings and metrics is
removed when it is.

Shape legend: B rows, T positions.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alphatoken.batch import Batch
from alphatoken.cli import readable_errors
from alphatoken.config.file import load_config
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig, as_reference
from alphatoken.data.cache import Document, TokenDataset
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError
from alphatoken.objectives.base import KeptLosses, Objective
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.evaluation import evaluate
from alphatoken.training.feed import Feed
from alphatoken.training.setup import Run, build_run
from alphatoken.training.trainer import Trainer
from alphatoken.util.files import publish_text
from benchmarks.corruptions import (
    MarkedRow,
    bad_tokens,
    corrupt,
    vocabulary_materials,
)
from benchmarks.measuring import device_name, versions
from benchmarks.studies.measures import (
    Judge,
    answer_metrics,
    choice_metrics,
    general_text_metrics,
)
from benchmarks.studies.rows import PROVIDERS, Parts, read_data, write_rows
from benchmarks.studies.settings import Arm, Job

Metrics = dict[str, float]

REPORTED = ("fisher_weighted_drift", "drift_norm")
"""Metrics of the last step that are taken over, besides those of its evaluation."""


REFERENCE = "reference"
"""Folder in that of a run: the run that trained its reference model."""


class BadTokens:
    """Which tokens of the training rows are bad, by the row's number, and what became of them."""

    def __init__(self, marks: Sequence[Sequence[bool]]) -> None:
        self._marks = [torch.tensor(row, dtype=torch.bool) for row in marks]
        self._tokens = self._bad = 0
        self._weight = self._bad_weight = 0.0

    def predicted_by(self, batch: Batch) -> Tensor:
        """Whether each position predicts a bad token, (B, T) bool. Rows without marks, which are
        held-out ones, have none."""
        document_BT = batch["document_ids"].cpu()
        bad_BT = torch.zeros(document_BT.shape, dtype=torch.bool)
        for document, row in enumerate(batch["rows"].tolist()):
            if row < len(self._marks):
                own_BT = document_BT == document
                length = int(own_BT.sum())
                bad_BT[own_BT] = (
                    self._marks[row][:length]
                    .roll(-1)
                    .index_fill(0, torch.tensor([length - 1]), value=False)
                )
        return bad_BT

    def observe(self, losses: KeptLosses) -> None:
        """Counts what a micro-batch trains on."""
        weight_BT = losses.weight_BT.detach().double().cpu()
        bad_BT = self.predicted_by(losses.batch)
        self._tokens += int((losses.response_BT.cpu() | bad_BT).sum())
        self._bad += int(bad_BT.sum())
        self._bad_weight += float(weight_BT[bad_BT].sum())
        self._weight += float(weight_BT.sum())

    def metrics(self) -> Metrics:
        """The weight of the average token, that of the average bad one, and the share of bad tokens
        in all weight; without bad tokens the first alone, before any training nothing."""
        if not self._tokens:
            return {}
        metrics = {"trained_share": self._weight / self._tokens}
        if self._bad:
            metrics["bad_trained"] = self._bad_weight / self._bad
            metrics["bad_of_trained"] = self._bad_weight / max(self._weight, 1.0)
        return metrics


class WatchedObjective(SupervisedObjective):
    """Supervised fine-tuning that counts the bad tokens which are trained on."""

    def __init__(self, bad: BadTokens) -> None:
        self._bad = bad

    def metrics(self, losses: KeptLosses) -> dict[str, Tensor]:
        self._bad.observe(losses)
        return super().metrics(losses)


class GoodTokens:
    """A data set whose bad tokens are read but not answered for: the oracle mask."""

    def __init__(self, dataset: TokenDataset, marks: Sequence[Sequence[bool]]) -> None:
        self._dataset = dataset
        self._marks = marks

    def __getitem__(self, index: int) -> list[Document]:
        ((ids, spoken),) = self._dataset[index]
        return [(ids, spoken & ~np.asarray(self._marks[index][: len(ids)]))]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def carry_out(job: Job, folder: Path) -> dict[str, Any]:
    """Trains and measures. Returns `metrics` and `seconds` by what they are of."""
    torch.set_num_threads(job.threads)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=job.model))
    parts = rows_of(job, tokenizer)
    began = time.perf_counter()
    if job.arm.reference == "held_out":
        before = reference_job(job)
        trained(before, prepared(before, folder / REFERENCE, parts), tokenizer, parts)
    config = prepared(job, folder, parts)
    metrics = trained(job, config, tokenizer, parts)
    seconds = {"training": time.perf_counter() - began}
    gc.collect()
    if job.purpose == "test":
        began = time.perf_counter()
        untouched = job.arm.kind == "untrained"
        model = job.model if untouched else str(config.train.output_dir / "export")
        metrics |= measured(job, model, tokenizer, parts)
        seconds["measuring"] = time.perf_counter() - began
    return {"metrics": metrics, "seconds": seconds}


def rows_of(job: Job, tokenizer: PreTrainedTokenizerBase) -> Parts:
    """The rows of the run, those to train on corrupted as its condition says."""
    sizes = job.sizes.model_dump(exclude={"seed"})
    condition = job.condition
    parts = PROVIDERS[condition.rows].make(sizes, job.sizes.seed, job.data)
    if condition.corruption == "none":
        return parts
    materials = vocabulary_materials(tokenizer)
    if condition.corruption == "off_target":
        others = [MarkedRow.from_json(row) for row in read_data(job.data, "dolly_train")]
        materials = dataclasses.replace(materials, others=others)
    corrupted = corrupt(
        condition.corruption,
        [MarkedRow.from_json(row) for row in parts["train"]],
        seed=job.seed,
        share=condition.share,
        materials=materials,
    )
    return {**parts, "train": [row.as_json() for row in corrupted]}


def reference_job(job: Job) -> Job:
    """The run that makes a run's reference model of the held-out rows, on all their tokens."""
    run = {name: section for name, section in job.run.items() if name != "reference"}
    plain = {"valuation": {"enabled": False}, "selection": {"policy": "all"}}
    arm = Arm(kind="held_out")
    return job.model_copy(update={"arm": arm, "run": {**run, **plain}, "rate": None})


def prepared(job: Job, folder: Path, parts: Parts) -> RunConfig:
    """The run's configuration, its rows written to where it reads them from."""
    for part, rows in parts.items():
        write_rows(rows, folder / "data" / f"{part}.jsonl")
    return configuration(job, folder)


def configuration(job: Job, folder: Path) -> RunConfig:
    """The run's configuration, which it leaves in `run.yaml` as any recipe reads it."""

    def of(part: str, **more: Any) -> dict[str, Any]:
        return {"path": str(folder / "data" / f"{part}.jsonl"), **more}

    share = job.arm.held_out_share
    train = {
        "held_out": [of("held_out")],
        "with_held_out": [of("train", weight=1 - share), of("held_out", weight=share)],
    }.get(job.arm.kind, [of("train")])
    values = copy.deepcopy(job.run)
    values.setdefault("model", {})["name_or_path"] = job.model
    data = values.setdefault("data", {})
    data.setdefault("cache_dir", str(folder / "cache"))
    data.update(
        {
            "train": train,
            "validation": of("held_out"),
            "eval": of("tuning" if job.purpose == "tuning" else "test"),
        }
    )
    if job.arm.reference == "held_out":
        export = folder / REFERENCE / "run" / "export"
        values["reference"] = {**as_reference(values.get("reference", {})), "model": str(export)}
    values.setdefault("train", {}).update({"seed": job.seed, "output_dir": str(folder / "run")})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    rate = [] if job.rate is None else [f"optim.lr={job.rate}"]
    config_class = RunConfig if job.recipe == "sft" else PreferenceRunConfig
    return load_config(config_class, file, [*job.arm.set, *rate])


def trained(
    job: Job, config: RunConfig, tokenizer: PreTrainedTokenizerBase, parts: Parts
) -> Metrics:
    """Trains, and returns the run's last evaluation and what became of the bad tokens; before any
    training for an untrained arm."""
    marks = marks_of(job, tokenizer, parts)
    bad = BadTokens(marks)
    objective: Objective
    if isinstance(config, PreferenceRunConfig):
        objective = PreferenceObjective(config.preference)
    else:
        objective = WatchedObjective(bad)
    run = build_run(config, objective)
    if marks and run.splits.train.sizes[0] != len(marks):
        raise UserError(
            f"only {run.splits.train.sizes[0]} of {len(marks)} corrupted rows fit: raise "
            f"data.max_length={config.data.max_length}"
        )
    if job.arm.kind == "untrained":
        return evaluate(
            model=run.model,
            objective=objective,
            batches=Feed(run).evaluation(),
            device=run.device,
            on_batch=lambda: None,
        )
    if job.arm.kind == "oracle" and marks:
        run = on_good_tokens(run, marks)
    if job.arm.pull:
        pull_to_start(run, job.arm.pull)
    Trainer(run).train()
    return {**reported(run.folder.metrics, run.total_steps), **bad.metrics()}


def reported(metrics_file: Path, total_steps: int) -> Metrics:
    """What is taken over of a run's last step. Raises UserError where the run was stopped before
    it."""
    last = json.loads(metrics_file.read_text(encoding="utf-8").splitlines()[-1])
    if last["step"] < total_steps:
        raise UserError(
            f"the run was stopped after step {last['step']} of {total_steps}, so there is nothing "
            "to report; the same command does it again"
        )
    return {
        name: value for name, value in last.items() if name.startswith("eval_") or name in REPORTED
    }


def marks_of(job: Job, tokenizer: PreTrainedTokenizerBase, parts: Parts) -> list[list[bool]]:
    """Whether each token of each row that may be trained on is bad; none where nothing is."""
    if job.condition.corruption == "none" or job.arm.kind == "held_out":
        return []
    return [bad_tokens(tokenizer, MarkedRow.from_json(row)) for row in parts["train"]]


def on_good_tokens(run: Run, marks: Sequence[Sequence[bool]]) -> Run:
    """The same run with the labels of bad tokens taken away."""
    good = GoodTokens(run.splits.train, marks)
    splits = dataclasses.replace(run.splits, train=cast(TokenDataset, good))
    return dataclasses.replace(run, splits=splits)


def pull_to_start(run: Run, weight: float) -> None:
    """Adds the gradient of `weight` |W - W_start|^2 / 2 to that of each optimizer step.

    Raises UserError where weights are sharded.
    """
    config = run.config.train
    passes = config.global_batch_size // config.micro_batch_size
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            if parameter.numel() == 0:
                raise UserError("pull needs whole weights: set deepspeed.config to a stage below 3")
            start = parameter.detach().clone()
            parameter.register_hook(_towards(parameter, start, weight / passes))


def _towards(parameter: Tensor, start: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient + weight * (parameter.detach() - start)


def measured(job: Job, model: str, tokenizer: PreTrainedTokenizerBase, parts: Parts) -> Metrics:
    """What the trained model is worth beyond the run's own evaluation."""
    wanted, metrics = job.measures, Metrics()
    judge = Judge(_loaded(model), tokenizer)
    if wanted.generated and job.recipe == "sft":
        rows = parts["test"][: wanted.generated]
        answers = judge.answers(
            [row["prompt"] for row in rows], wanted.max_new_tokens, wanted.batch_size
        )
        metrics |= answer_metrics(answers, [row["response"] for row in rows])
    if wanted.general_text and job.data is not None:
        texts = [row["text"] for row in read_data(job.data, "general_text")]
        chosen = texts[:: max(1, len(texts) // wanted.general_text)][: wanted.general_text]
        start = None if model == job.model else Judge(_loaded(job.model), tokenizer)
        metrics |= general_text_metrics(judge, start, chosen, wanted.max_length)
    if wanted.choices and job.data is not None:
        hellaswag = read_data(job.data, "hellaswag_val")[: wanted.choices]
        metrics |= choice_metrics(
            judge, "hellaswag", [(row["ctx"], row["endings"], row["label"]) for row in hellaswag]
        )
        arc = read_data(job.data, "arc_challenge_test")[: wanted.choices]
        metrics |= choice_metrics(
            judge,
            "arc",
            [(f"Question: {r['question']}\nAnswer:", r["choices"], r["label"]) for r in arc],
        )
    return metrics


def _loaded(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(_device()).eval()


def finish(folder: Path) -> None:
    """Does the run of a folder. Raises UserError where another process is at it."""
    try:
        with FileLock(folder / "lock", timeout=0):
            text = (folder / "job.json").read_text(encoding="utf-8")
            _remove(folder, "run", "data", "cache", REFERENCE)  # of a run that was killed
            result = {
                "job": json.loads(text),
                **carry_out(Job.model_validate_json(text), folder),
                "device": device_name(_device()),
                "versions": versions(),
            }
            _remove(folder, "run/export", "data", "cache", REFERENCE)
            publish_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    except Timeout:
        raise UserError(f"{folder}: another process does this run") from None


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    with readable_errors():
        finish(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
