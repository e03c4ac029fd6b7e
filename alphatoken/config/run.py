"""The configuration of a training run: its sections, and the checks that need more than one of
them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alphatoken.config.choices import OneOf
from alphatoken.config.evaluation import Better, EvaluationConfig, EvaluationTask
from alphatoken.config.policies import POLICY_TRAITS, Need
from alphatoken.config.sections import (
    MAY_CHANGE,
    DataConfig,
    FilePath,
    FisherConfig,
    ModelConfig,
    Pair,
    ReferenceConfig,
    ReferenceMode,
    Section,
    as_reference,
)
from alphatoken.config.selection import Normalise, SelectionConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.config.weights import WEIGHT_TRAITS

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
        "train on longer rows (docs/long_context.md). It divides the number of ranks and the "
        "model's attention heads.",
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
    resume: str = Field(
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
        "the step is dropped and done again on resuming; default: the step is always finished.",
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
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, more time."
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


class RunConfig(Section):
    """What every training recipe needs."""

    model: ModelConfig
    data: DataConfig
    valuation: ValuationConfig = Field(default_factory=ValuationConfig)
    fisher: FisherConfig = Field(default_factory=FisherConfig)
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    # `reference: online` is short for `reference: {mode: online}`.
    reference: Annotated[
        ReferenceConfig,
        BeforeValidator(as_reference, json_schema_input_type=ReferenceMode | ReferenceConfig),
    ] = Field(default_factory=ReferenceConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig,
        json_schema_extra=MAY_CHANGE,
    )
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig,
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def estimates_fisher(self) -> bool:
        """Whether a training run has to estimate the Fisher by itself."""
        return (
            self.valuation.enabled
            and self.valuation.fisher is None
            and self.valuation.stability_weight > 0
        )

    @property
    def selections(self) -> tuple[SelectionConfig, ...]:
        """The selection of each response of a row: its only one here, the chosen and the rejected
        one of pairs."""
        return (self.selection,)

    @property
    def trains_on_pairs(self) -> bool:
        """Whether a row has a chosen and a rejected response."""
        return False

    @property
    def policies(self) -> tuple[str, ...]:
        """The name of each selection's policy, or of its default."""
        default = "top_value" if self.valuation.enabled else "all"
        return tuple(selection.policy or default for selection in self.selections)

    @property
    def normalise(self) -> Normalise:
        """Which tokens' number the sum of losses is divided by."""
        known = all(selection.count_follows_from_labels for selection in self.selections)
        return self.selection.normalise or ("kept" if known else "response")

    @property
    def asked(self) -> list[EvaluationTask]:
        """The tasks that the model is asked during a run."""
        return [each for each in self.evaluation.tasks if each.called in self.train.evaluate]

    @property
    def evaluated_metrics(self) -> dict[str, Better]:
        """What evaluations during a run measure, by metric, and which way is better."""
        found: dict[str, Better] = {}
        if self.data.eval is not None:
            found["eval_loss"] = "lower"
        for task in self.asked:
            for measure, better in task.traits.measures.items():
                found[f"eval_{measure}/{task.called}"] = better
        return found

    @property
    def needs_noise(self) -> bool:
        """Whether a selection needs noise with every batch."""
        return any("noise" in needs for _, needs in self._needs())

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the model's predictions is needed."""
        return any("entropy" in needs for _, needs in self._needs())

    @property
    def needs_reference(self) -> bool:
        """Whether the token losses of a reference model are needed."""
        return any({"reference", "start"} & needs for _, needs in self._needs())

    @property
    def needs_store(self) -> bool:
        """Whether a selection reads values that were made before."""
        return any("store" in needs for _, needs in self._needs())

    def selects_at(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) values and selects tokens."""
        return step >= self.valuation.start_step

    def _needs(self) -> list[tuple[str, frozenset[Need]]]:
        """The settings of all selections that need something of the run, and what."""
        found: list[tuple[str, frozenset[Need]]] = []
        for selection, policy in zip(self.selections, self.policies, strict=True):
            found.append((f"selection.policy={policy}", POLICY_TRAITS[policy].needs))
            weights = selection.weights
            found.append((f"selection.weights={weights}", WEIGHT_TRAITS[weights].needs))
            if selection.veto is not None:
                by = selection.veto.by
                found.append((f"selection.veto.by={by}", POLICY_TRAITS[by].needs))
                if selection.veto.unit == "noise":
                    found.append(("selection.veto.unit=noise", SPREAD))
            if selection.threshold_unit == "noise":
                found.append(("selection.threshold_unit=noise", SPREAD))
            if selection.keep_ratio == "auto":
                found.append(("selection.keep_ratio=auto", SPREAD))
        return found

    @model_validator(mode="after")
    def _target_has_pairs(self) -> RunConfig:
        if self.valuation.target == "preference" and not self.trains_on_pairs:
            raise ValueError(
                "valuation.target=preference needs pairs: run recipes/preference.py with a section "
                "preference, or set valuation.target=sft"
            )
        return self

    @model_validator(mode="after")
    def _moment_is_of_tokens(self) -> RunConfig:
        valuation = self.valuation
        if valuation.enabled and valuation.contrast_source == "moment" and self.trains_on_pairs:
            raise ValueError(
                "valuation.contrast_from=moment: Adam's moment is of an objective per pair here, "
                "many times the gradients per token that it would be subtracted from; use drawn"
            )
        return self

    @model_validator(mode="after")
    def _held_out_rows_are_known(self) -> RunConfig:
        if not self.valuation.enabled:
            return self
        from_train = self.valuation.held_out == "train"
        if self.data.validation is None and not from_train:
            raise ValueError(
                "valuation.enabled=true needs data.validation: held-out rows of the target task "
                "(or set valuation.held_out=train to take other rows of data.train, or "
                "valuation.enabled=false to fine-tune without token values)"
            )
        if self.data.validation is not None and from_train:
            raise ValueError(
                "valuation.held_out=train takes held-out rows from data.train, so data.validation "
                "is not read: leave it out (rows for the Fisher go to fisher.prompts), or set "
                "valuation.held_out=validation"
            )
        if from_train and self.estimates_fisher and self.fisher.prompts is None:
            raise ValueError(
                "valuation.held_out=train leaves no data.validation to estimate the Fisher on: set "
                "fisher.prompts to rows that are not trained on, valuation.fisher to an estimate, "
                "or valuation.stability_weight=0"
            )
        return self

    def held_out_batch_rows(self, rows: int, longest: int, ranks: int) -> int:
        """Rows per micro-batch of a draw of so many that steer values, the longest of so many
        tokens. A few are spread over all ranks rather than left to one."""
        size, tokens = self.train.micro_batch_size, self.valuation.held_out_batch_tokens
        if tokens is not None:
            size = max(1, tokens // longest)
        return min(size, -(-rows // ranks))

    @model_validator(mode="after")
    def _keys_go_together(self) -> RunConfig:
        if (
            self.train.save_every is not None
            and self.train.save_every % self.valuation.refresh_every
        ):
            raise ValueError(
                f"train.save_every={self.train.save_every} is not a multiple of "
                f"valuation.refresh_every={self.valuation.refresh_every}: a resumed run could not "
                "rebuild the validation signals"
            )
        if self.valuation.balance == "std" and not self.valuation.split_terms:
            raise ValueError(
                "valuation.balance=std needs adaptation and stability apart: "
                "valuation.split_terms=true"
            )
        if self.valuation.reference is not None and self.valuation.fisher is None:
            raise ValueError(
                "valuation.reference is given without valuation.fisher; stability needs the Fisher "
                "file"
            )
        if self.model.lora is not None and self.valuation.parameters == "norms":
            raise ValueError(
                "valuation.parameters=norms, but model.lora trains no norms: use linears or all"
            )
        for selection, policy in zip(self.selections, self.policies, strict=True):
            _check_selection(selection, policy)
        for setting, needs in self._needs():
            self._check_needs(setting, needs)
        return self

    @model_validator(mode="after")
    def _what_is_evaluated_is_known(self) -> RunConfig:
        train, tasks = self.train, [each.called for each in self.evaluation.tasks]
        for name in train.evaluate:
            if name not in tasks:
                raise ValueError(
                    f"train.evaluate names {name!r}, which evaluation.tasks does not have; it has "
                    f"{', '.join(tasks) or 'none'}"
                )
        if train.stop_after is not None and train.keep_best is None:
            raise ValueError(
                f"train.stop_after={train.stop_after} needs train.keep_best, the metric that has "
                "to get better"
            )
        if train.keep_best is None:
            return self
        known = self.evaluated_metrics
        if train.keep_best not in known:
            raise ValueError(
                f"train.keep_best={train.keep_best} is not evaluated; evaluations give "
                f"{', '.join(known) or 'nothing: set data.eval, or train.evaluate'}"
            )
        every = train.eval_every
        if every is None or every % self.valuation.refresh_every:
            raise ValueError(
                f"train.keep_best={train.keep_best} needs evaluations between the first and the "
                f"last, after which a checkpoint can be saved: set train.eval_every (now {every}) "
                f"to a multiple of valuation.refresh_every={self.valuation.refresh_every}"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_be_divided(self) -> RunConfig:
        parts = self.train.sequence_parallel
        if parts > 1 and self.train.evaluate:
            raise ValueError(
                f"train.sequence_parallel={parts} is not possible with train.evaluate: tasks are "
                "answered from whole prompts, which no rank has; evaluate the export with "
                "alphatoken evaluate"
            )
        return self

    def _check_needs(self, setting: str, needs: frozenset[Need]) -> None:
        """Raises ValueError where the run does not provide what a setting needs."""
        if needs & {"values", "terms", "spread"} and not self.valuation.enabled:
            raise ValueError(f"{setting} needs valuation.enabled=true")
        if "terms" in needs and not self.valuation.split_terms:
            raise ValueError(f"{setting} needs the terms of values: valuation.split_terms=true")
        if "spread" in needs and not self.valuation.reliability:
            raise ValueError(
                f"{setting} needs to know how reliable values are: valuation.reliability=true"
            )
        if "store" in needs and self.selection.store is None:
            raise ValueError(
                f"{setting} needs selection.store, a folder that recipes/value_tokens.py has "
                "written"
            )
        if "reference" in needs and self.reference.model is None:
            raise ValueError(f"{setting} needs reference.model, trained on data that is wanted")


SPREAD: frozenset[Need] = frozenset({"values", "spread"})


def _check_selection(selection: SelectionConfig, policy: str) -> None:
    """Raises ValueError where a setting cannot be used with the policy it is used with."""
    traits, weights = POLICY_TRAITS[policy], selection.weights
    if WEIGHT_TRAITS[weights].grades and not traits.grades:
        raise ValueError(
            f"selection.weights={weights} needs a policy that ranks tokens, not {policy}"
        )
    if selection.keep_ratio == "auto" and policy != "top_value":
        raise ValueError(
            "selection.keep_ratio=auto drops harmful tokens: it needs selection.policy=top_value, "
            f"not {policy}"
        )
    if selection.threshold is not None and (traits.keeps_all or "noise" in traits.needs):
        raise ValueError(
            f"selection.threshold={selection.threshold} needs a policy whose sort key says "
            f"something of a token, not {policy}"
        )
    in_noise = {}
    if selection.threshold_unit == "noise":
        in_noise["selection.threshold_unit"] = policy
    if selection.veto is not None and selection.veto.unit == "noise":
        in_noise["selection.veto.unit"] = selection.veto.by
    for key, name in in_noise.items():
        if not POLICY_TRAITS[name].in_value:
            raise ValueError(
                f"{key}=noise needs a policy that sorts by values, not {name}: its threshold has "
                "another unit"
            )
