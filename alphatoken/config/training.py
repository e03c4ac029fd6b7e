"""The sections of a run that say how it trains: optimizer, length and batches, DeepSpeed, and what
is logged."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alphatoken.config.choices import OneOf
from alphatoken.config.sections import MAY_CHANGE, FilePath, Pair, PathOrName, Section

OTHER_OPTIMIZERS = {
    "adamw8bit": "its moments lie in integers with scales, which neither checkpoints, opened as "
    "tensors and numbers alone, nor valuation.preconditioner=adam read",
    "adafactor": "it keeps the second moment of a matrix by its rows and columns, and ZeRO hands "
    "optimizers flat slices, on which torch's keeps the whole moment",
    "muon": "it makes the update of a whole matrix orthogonal and keeps no second moment; values "
    "and resumed runs have not been tested on what DeepSpeed makes of that in its slices",
}
"""Why an optimizer of the field is refused."""


class OptimConfig(Section):
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw"] = Field(
        "adamw",
        description="Optimizer. AdamW is the only one: others are refused with the reason.",
    )
    lr: float = Field(2e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay; norms and biases are exempt."
    )
    betas: Pair = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of all steps in which the rate rises linearly."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warmup."
    )
    clip: float = Field(1.0, ge=0, description="Global gradient norm limit; 0 turns clipping off.")

    @field_validator("name", mode="before")
    @classmethod
    def _others_have_a_reason(cls, value: Any) -> Any:
        if isinstance(value, str) and value in OTHER_OPTIMIZERS:
            raise ValueError(
                f"optim.name={value} is not possible here: {OTHER_OPTIMIZERS[value]}; use adamw"
            )
        return value


class TrainConfig(Section):
    """Length, batches, saving, resuming and seed of a run."""

    global_batch_size: int = Field(
        64, ge=1, description="Rows per optimizer step, over all ranks and micro-batches."
    )
    micro_batch_size: int = Field(
        4,
        ge=1,
        description="Rows per forward pass on one rank, or on the ranks that share rows.",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Cut every row into so many equal parts, one for each of so many ranks, to "
        "train on longer rows (docs/long_context.md). It divides the number of ranks, and is at "
        "most that of the model's attention heads, best a divisor of it.",
        json_schema_extra=MAY_CHANGE,
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    seed: int = Field(
        0, ge=0, description="Seed of data order, validation draws and the random policy."
    )
    output_dir: FilePath = Field(
        description="Run folder: config.yaml, metrics.jsonl, checkpoints/, export/.",
        json_schema_extra=MAY_CHANGE,
    )
    resume: PathOrName = Field(
        "never",
        description="never, auto (newest complete checkpoint of output_dir, if any) or a "
        "checkpoint's "
        "path.",
        json_schema_extra=MAY_CHANGE,
    )
    resume_allow: list[str] = Field(
        default_factory=list,
        description="Keys (* stands for any part) whose values may differ from the "
        "resumed checkpoint's.",
        json_schema_extra=MAY_CHANGE,
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between checkpoints; default: no checkpoints.",
        json_schema_extra=MAY_CHANGE,
    )
    keep_last: int | None = Field(
        None,
        ge=1,
        description="Keep only so many newest checkpoints; default: all.",
        json_schema_extra=MAY_CHANGE,
    )
    keep_every: int | None = Field(
        None,
        ge=1,
        description="With keep_last: keep the checkpoints of every so many steps as well.",
        json_schema_extra=MAY_CHANGE,
    )
    grace_seconds: float | None = Field(
        None,
        gt=0,
        description="Time between SIGTERM or SIGUSR1 and the end by force. Where it is too "
        "short for the "
        "current step, "
        "the step is dropped and done again on resuming; an evaluation is left for the resumed "
        "run, too. Default: both are always finished.",
        json_schema_extra=MAY_CHANGE,
    )
    watchdog_seconds: float | None = Field(
        300.0,
        gt=0,
        description="Name the rank that holds up the others when nothing moves for so "
        "long; null: never.",
        json_schema_extra=MAY_CHANGE,
    )
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between evaluations, besides first and last.",
        json_schema_extra=MAY_CHANGE,
    )
    evaluate: list[str] = Field(
        default_factory=list,
        description="Tasks of evaluation.tasks, by name, that the model is asked at every "
        "evaluation; the run then ends with what was learned and what was kept.",
        json_schema_extra=MAY_CHANGE,
    )
    keep_best: str | None = Field(
        None,
        description="Metric of the evaluations, such as eval_loss or eval_exact_match/gsm8k: the "
        "checkpoint with the best one is kept, and exported at the end.",
        json_schema_extra=MAY_CHANGE,
    )
    stop_after: int | None = Field(
        None,
        ge=1,
        description="End training after so many evaluations in which keep_best was no better.",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_checkpointing: bool | Literal["offload"] = Field(
        False,
        description="Recompute activations in backward: less memory, more time. offload: what "
        "enters each layer is moved to host memory until then, too.",
    )

    deterministic: bool = Field(
        False,
        description="Only kernels that give the same bits every time: slower on GPUs, and an "
        "operation without such a kernel stops the run. CPUs do so by themselves.",
    )

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run on so many training rows."""
        return self.max_steps or math.ceil(self.epochs * rows / self.global_batch_size)

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={self.micro_batch_size}"
            )
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(
                f"train.keep_every={self.keep_every} needs train.keep_last: without it all are kept"
            )
        return self


class DeepSpeedConfig(Section):
    """DeepSpeed's own configuration, and how long ranks wait for each other."""

    config: FilePath | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed JSON (file or mapping), passed through; default: plain "
        "ZeRO stage 3.",
    )
    timeout_minutes: float | None = Field(
        None,
        gt=0,
        description="How long ranks wait for each other in a message of tensors before the run "
        "ends; default: DEEPSPEED_TIMEOUT, or 30. Saving, hashing, converting and exporting do "
        "not count: ranks wait for those for hours.",
        json_schema_extra=MAY_CHANGE,
    )


TRACKERS: dict[str, str] = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""What a run can report to, and the package that each needs."""
TrackerName = Annotated[str, OneOf(TRACKERS)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LoggingConfig(Section):
    """Where metrics go besides `metrics.jsonl`, and how often lines are printed."""

    report_to: Annotated[
        list[TrackerName],
        BeforeValidator(_as_list, json_schema_input_type=TrackerName | list[TrackerName]),
    ] = Field(
        default_factory=list,
        description="Trackers that get every number and the configuration, and tables of valued "
        "tokens where they have tables; a resumed run continues the same run there.",
    )
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled",
        description="How Weights & Biases runs; but for disabled it need not be in report_to. "
        "disabled beside report_to: [wandb] leaves it to WANDB_MODE.",
    )
    project: str = Field("alphatoken", description="Project, or experiment, of trackers.")
    name: str | None = Field(
        None, description="Run name in trackers; default: the output folder's name."
    )
    every: int = Field(
        1, ge=1, description="Optimizer steps between console lines; metrics.jsonl has every step."
    )
    responses: int = Field(
        2,
        ge=0,
        description="Responses kept for the report, token by token, of each of up to 100 steps.",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of `TRACKERS`, each once."""
        by_mode = [] if self.wandb == "disabled" else ["wandb"]
        return tuple(dict.fromkeys([*self.report_to, *by_mode]))
