"""What a study's YAML file says, and what one run of it needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from alphatoken.config.sections import FilePath, Section
from benchmarks.corruptions import CORRUPTIONS
from benchmarks.studies.rows import PROVIDERS

Kind = Literal["trained", "untrained", "oracle", "held_out", "with_held_out"]
Purpose = Literal["tuning", "test"]


class Condition(Section):
    """What the training rows are."""

    rows: str = Field("problems", description="Where rows come from, a name in rows.PROVIDERS.")
    corruption: str = Field(
        "none", description="What is done to training rows, a name in corruptions.CORRUPTIONS."
    )
    share: float = Field(0.6, ge=0, le=1, description="Share of the training rows it is done to.")

    @model_validator(mode="after")
    def _names_are_known(self) -> Condition:
        for key, value, known in (
            ("rows", self.rows, PROVIDERS),
            ("corruption", self.corruption, CORRUPTIONS),
        ):
            if value not in known:
                raise ValueError(f"{key}: {value!r} is not one of {', '.join(known)}")
        if PROVIDERS[self.rows].pairs and self.corruption != "none":
            raise ValueError(f"rows: {self.rows} are pairs, and corruptions are of responses")
        return self


class Arm(Section):
    """A way to train; a list of overrides is short for {set: LIST}."""

    kind: Kind = Field(
        "trained",
        description="trained: on the rows as they are; oracle: on their good tokens only; "
        "held_out: on the held-out rows alone; with_held_out: on both; untrained: not at all.",
    )
    set: list[str] = Field(
        default_factory=list,
        description="What differs from `run`: section.key=value of the run's configuration.",
    )
    held_out_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="with_held_out: how many of the rows that are trained on are held-out ones.",
    )
    reference: Literal["start", "held_out"] = Field(
        "start",
        description="The reference model: what the run starts from, or that trained before on the "
        "held-out rows alone, on all their tokens and otherwise as `run` says.",
    )
    pull: float = Field(
        0.0,
        ge=0,
        description="Weight of |W - W_start|^2 / 2 in the loss (ZeRO stages 0 to 2).",
    )

    @model_validator(mode="after")
    def _a_reference_is_compared_with(self) -> Arm:
        if self.kind == "untrained" and self.reference != "start":
            raise ValueError(f"reference: {self.reference} is of no use to kind: untrained")
        return self


class Sizes(Section):
    """Rows of each part; no row is in two of them."""

    train: int = Field(ge=1, description="Rows to train on.")
    held_out: int = Field(ge=1, description="Clean rows that steer the values.")
    tuning: int = Field(0, ge=0, description="Clean rows that learning rates are chosen on.")
    test: int = Field(ge=1, description="Clean rows that are reported on.")
    seed: int = Field(0, ge=0, description="Seed of the rows, the same in every run.")


class Measures(Section):
    """What is measured besides the run's own evaluation of the test rows."""

    generated: int = Field(0, ge=0, description="Test prompts that are answered, greedily.")
    max_new_tokens: int = Field(96, ge=1, description="Longest answer.")
    general_text: int = Field(
        0, ge=0, description="Passages of general text whose loss, and KL to the start, is taken."
    )
    choices: int = Field(
        0, ge=0, description="Questions of HellaSwag and of ARC whose margin is taken, each."
    )
    max_length: int = Field(256, ge=8, description="Longest text of either, in tokens.")
    batch_size: int = Field(32, ge=1, description="Answers that are generated together.")


def _as_arm(value: Any) -> Any:
    return {"set": value} if isinstance(value, list) else value


class StudySettings(Section):
    """A study: every arm in every condition, with every seed."""

    name: str = Field(description="Names the results' files.")
    title: str = Field(description="What the study asks, above its table.")
    recipe: Literal["sft", "preference"] = Field("sft", description="Which recipe trains.")
    model: str = Field("models/smollm2", description="Folder of the model to start from.")
    threads: int = Field(2, ge=1, description="Threads of a run.")
    sizes: Sizes
    run: dict[str, Any] = Field(
        description="The run's configuration but for model.name_or_path, data and "
        "train.output_dir; of data only max_length, cache_dir and how rows are laid out."
    )
    conditions: dict[str, Condition]
    arms: dict[str, Annotated[Arm, BeforeValidator(_as_arm)]]
    skip: dict[str, list[str]] = Field(
        default_factory=dict, description="Arms that are not run in a condition, by condition."
    )
    seeds: list[int] = Field(min_length=1)
    rates: list[float] = Field(
        default_factory=list,
        description="Learning rates to choose from, per condition and arm, by the loss of the "
        "tuning rows; none: as `run` says.",
    )
    tuning_seed: int = Field(1000, ge=0, description="Seed of the runs that choose a rate.")
    measures: Measures = Field(default_factory=Measures)
    baseline: str = Field("all", description="The arm that the others are compared with.")

    def arms_in(self, condition: str) -> list[str]:
        """The arms that are run in a condition, in the order of the file."""
        left_out = self.skip.get(condition, [])
        return [arm for arm in self.arms if arm not in left_out]

    def of_run(self, condition: str, arm: str) -> dict[str, Any]:
        """All that a run of an arm in a condition depends on but its seed; what is reported of two
        such runs is the same where this is."""
        shared = {"recipe", "model", "threads", "sizes", "run", "measures", "rates", "tuning_seed"}
        own: dict[str, Any] = {"condition": None, "arm": None}
        if condition in self.conditions and arm in self.arms:
            own = {"condition": self.conditions[condition], "arm": self.arms[arm]}
        return {**self.model_dump(include=shared), **own}

    @model_validator(mode="after")
    def _what_is_skipped_is_known(self) -> StudySettings:
        for condition, arms in self.skip.items():
            if condition not in self.conditions:
                raise ValueError(f"skip: there is no condition {condition!r}")
            for arm in arms:
                if arm not in self.arms or arm == self.baseline:
                    raise ValueError(f"skip.{condition}: {arm!r} is no arm, or it is the baseline")
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> StudySettings:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: there is no arm {self.baseline!r}")
        if self.rates and not self.sizes.tuning:
            raise ValueError("rates are chosen on tuning rows: set sizes.tuning")
        for name, condition in self.conditions.items():
            if PROVIDERS[condition.rows].pairs != (self.recipe == "preference"):
                raise ValueError(
                    f"conditions.{name}.rows: {condition.rows} do not fit recipe: {self.recipe}"
                )
        if self.recipe == "preference":
            for name, arm in self.arms.items():
                if arm.kind not in ("trained", "untrained"):
                    raise ValueError(f"arms.{name}.kind: {arm.kind} is for recipe: sft")
                if arm.reference != "start":
                    raise ValueError(f"arms.{name}.reference: {arm.reference} is for recipe: sft")
        return self


class Job(Section):
    """One run, and all it depends on."""

    recipe: Literal["sft", "preference"]
    model: str
    threads: int
    sizes: Sizes
    run: dict[str, Any]
    condition: Condition
    arm: Arm
    measures: Measures
    purpose: Purpose
    seed: int
    rate: float | None
    data: FilePath | None = Field(description="Folder of the data sets; None: there is none.")


def job_of(
    study: StudySettings,
    condition: str,
    arm: str,
    *,
    seed: int,
    purpose: Purpose,
    data: Path | None,
) -> Job:
    """The run of an arm in a condition, at the rate of `run`."""
    return Job(
        recipe=study.recipe,
        model=study.model,
        threads=study.threads,
        sizes=study.sizes,
        run=study.run,
        condition=study.conditions[condition],
        arm=study.arms[arm],
        measures=study.measures,
        purpose=purpose,
        seed=seed,
        rate=None,
        data=data,
    )
