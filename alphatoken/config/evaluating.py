"""The configuration that `recipes/evaluate.py` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import DataConfig, FilePath, Sources
from alphatoken.config.training import TrainConfig
from alphatoken.config.valuation import ValuationConfig


class EvaluatedDataConfig(DataConfig):
    """How rows are read and tokenised, by a model that is not trained on any."""

    train: Sources = Field(
        default_factory=list, description="Rows that a run trains on; not read here."
    )


class EvaluatedTrainConfig(TrainConfig):
    """A run's keys, of which an evaluation reads the folder."""

    output_dir: FilePath = Field(
        Path(),
        description="Folder that the evaluation is written to; default: where it is started.",
    )


class EvaluationRunConfig(RunConfig):
    """What evaluating a model needs: `model` and `evaluation`. The rest of a run's configuration
    may be there, so that one file serves both."""

    default_choice: ClassVar[dict[str, dict[str, Any]]] = {}
    """Nothing is trained."""

    data: EvaluatedDataConfig = Field(default_factory=EvaluatedDataConfig)
    valuation: ValuationConfig = Field(default_factory=lambda: ValuationConfig(enabled=False))
    train: EvaluatedTrainConfig = Field(default_factory=EvaluatedTrainConfig)
