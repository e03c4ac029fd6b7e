"""Configuration of what a model is asked to show what it can do, during a run or by
`recipes/evaluate.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from alphatoken.config.choices import OneOf
from alphatoken.config.sections import FilePath, Section, Sources

Better = Literal["higher", "lower"]
Part = Literal["target", "retention"]


@dataclass(frozen=True)
class TaskTraits:
    """What the configuration knows of a kind of task."""

    measures: dict[str, Better]
    """What it measures, the one that comparisons are made by first, and which way is better."""
    part: Part
    """Whether it is taken to show what a run is to teach, or what it is to keep."""
    reads_eval: bool = False
    """Whether its rows are those of `data.eval` where it names none."""
    runs_code: bool = False


TASKS: dict[str, TaskTraits] = {
    "target_loss": TaskTraits({"loss": "lower"}, "target", reads_eval=True),
    "exact_match": TaskTraits({"exact_match": "higher"}, "target", reads_eval=True),
    "multiple_choice": TaskTraits({"acc_norm": "higher", "acc": "higher"}, "retention"),
    "perplexity": TaskTraits({"perplexity": "lower", "byte_perplexity": "lower"}, "retention"),
    "preference_accuracy": TaskTraits(
        {"accuracy": "higher", "accuracy_norm": "higher"}, "target", reads_eval=True
    ),
    "humaneval": TaskTraits({"pass_at_1": "higher"}, "target", runs_code=True),
    "mbpp": TaskTraits({"pass_at_1": "higher"}, "target", runs_code=True),
}


class EvaluationTask(Section):
    """One thing that a model is asked, and of which rows."""

    task: Annotated[str, OneOf(TASKS)] = Field(description="What is measured.")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="What it is called in tables, metrics and files; default: the task.",
    )
    data: Sources | None = Field(
        None,
        description="Its rows: a path, or a list of {path, skip, first}; default of target_loss, "
        "exact_match and preference_accuracy: data.eval.",
    )
    part: Part | None = Field(
        None,
        description="Whether a comparison counts it to what was to be learned or to what was to be "
        "kept; default: retention for multiple_choice and perplexity, else target.",
    )
    match: Literal["number", "text"] = Field(
        "number",
        description="exact_match: whether the last numbers of answer and reference are equal, or "
        "their whole texts.",
    )
    max_new_tokens: int = Field(256, ge=1, description="Longest answer that is generated.")

    @model_validator(mode="after")
    def _rows_are_read_once_as_they_are(self) -> EvaluationTask:
        for source in self.data or ():
            if source.weight is not None:
                raise ValueError(
                    f"evaluation task {self.called}: data has weight={source.weight:g}, but every "
                    "row is asked once; leave it out"
                )
            if source.format != "auto" and not self.traits.reads_eval:
                raise ValueError(
                    f"evaluation task {self.called}: data has format={source.format}, but "
                    f"{self.task} reads rows as they are; leave it out, or name columns"
                )
        return self

    @property
    def called(self) -> str:
        """The name that it goes by."""
        return self.name or self.task

    @property
    def traits(self) -> TaskTraits:
        return TASKS[self.task]

    @property
    def counts_to(self) -> Part:
        """The part of a comparison that it belongs to."""
        return self.part or self.traits.part


class EvaluationConfig(Section):
    """What is evaluated, and how."""

    tasks: list[EvaluationTask] = Field(
        default_factory=list,
        description="What a model is asked: a list of {task, name, data, ...}; tasks and their "
        "keys are in docs/evaluation.md.",
    )
    batch_size: int = Field(
        8, ge=1, description="Texts or prompts per pass on one rank. It changes rounding only."
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Tokens that the model sees at once: longer texts are read in parts, and "
        "longer questions lose their beginning or are left out; each is counted.",
    )
    resamples: int = Field(
        1000, ge=1, description="Bootstrap resamples of the items, for 95 % intervals."
    )
    seed: int = Field(0, ge=0, description="Seed of the resamples.")
    output: FilePath | None = Field(
        None,
        description="recipes/evaluate.py: the file written; default: evaluation.json in "
        "train.output_dir, or in the folder it is started in.",
    )
    compare_with: FilePath | None = Field(
        None,
        description="recipes/evaluate.py: the file of an earlier evaluation of the same items, "
        "which this one is compared with.",
    )
    allow_code_execution: bool = Field(
        False,
        description="Run the programs that the model writes for humaneval and mbpp, in a sandbox.",
    )
    code_seconds: float = Field(10.0, gt=0, description="Time limit of such a program.")
    code_megabytes: int = Field(
        1024, ge=64, description="Memory limit of each process of such a program, in MiB."
    )

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, value: list[EvaluationTask]) -> list[EvaluationTask]:
        for name, count in Counter(each.called for each in value).items():
            if count > 1:
                raise ValueError(
                    f"{count} tasks of evaluation.tasks are called {name!r}: give them names"
                )
        return value

    @model_validator(mode="after")
    def _code_may_run(self) -> EvaluationConfig:
        for each in self.tasks:
            if each.traits.runs_code and not self.allow_code_execution:
                raise ValueError(
                    f"evaluation.tasks has {each.task}, which runs programs that the model writes "
                    "and nobody has read: set evaluation.allow_code_execution=true to run them in "
                    "a sandbox"
                )
        return self
