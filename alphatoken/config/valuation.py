"""Section `valuation`: how values of response tokens are computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alphatoken.config.estimators import (
    ESTIMATORS,
    EstimatorName,
    keys_of_some,
    readers_of,
    with_contrast_from,
)
from alphatoken.config.sections import FilePath, Section


class ValuationConfig(Section):
    """How values of response tokens are computed."""

    enabled: bool = Field(
        True,
        description="Value tokens and choose by their values what is trained on; false is "
        "plain fine-tuning.",
    )
    estimator: EstimatorName = Field(
        "ghost",
        description="How values are estimated: "
        + "; ".join(f"{name}, {each.values}" for name, each in ESTIMATORS.items())
        + ".",
    )
    layers: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        3, description="Number of last decoder layers that are scored (K), or all."
    )
    parameters: Literal["linears", "norms", "all"] = Field(
        "linears",
        description="Which weights of those layers are scored; norms and all (with the final "
        "norm and the "
        "head, and "
        "with all layers the embeddings) need estimator exact.",
    )
    preconditioner: Literal["none", "adam"] = Field(
        "none",
        description="adam scales directions like the optimizer scales gradients, by the "
        "inverse root of its "
        "second "
        "moment; needs estimator exact.",
    )
    window: int = Field(
        32,
        ge=0,
        description="How many later positions the causal path looks at (w); 0 turns it off.",
    )
    stability_weight: float = Field(
        1.5, ge=0, description="Weight of stability against adaptation (lambda)."
    )
    contrast: float = Field(
        0.0,
        ge=0,
        description="Weight (c) of the mean gradient of other training rows, B, which is "
        "subtracted from the held-out one: a value is then the effect on the held-out loss less c "
        "times that on the training loss. 0 is the published value.",
    )
    contrast_from: Literal["auto", "scored", "drawn", "moment"] = Field(
        "auto",
        description="Where B comes from: scored is the mean over the tokens that earlier steps "
        "have scored (estimator ghost; nearly free), drawn a pass over as many training rows as "
        "validation_sequences, those of the next steps, at every refresh, without the tokens that "
        "selection.veto rules out by a threshold known before values, and moment Adam's first "
        "moment, which is of the kept tokens' objective alone, after clipping (estimator exact). "
        "auto is scored for ghost and drawn for exact.",
    )
    contrast_memory: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Decay per optimizer step of the exponential mean over scored tokens "
        "(contrast_from scored).",
    )
    reliability: bool = Field(
        False,
        description="Value tokens under two halves of the held-out rows as well, so that "
        "selections know how reliable a value is.",
    )
    validation_sequences: int = Field(
        32, ge=1, description="Held-out sequences per refresh, over all ranks together."
    )
    target: Literal["sft", "preference"] = Field(
        "sft",
        description="Preference runs: whether values ask what lowers the loss of held-out chosen "
        "responses (as published), or the preference objective of held-out pairs.",
    )
    held_out: Literal["validation", "train"] = Field(
        "validation",
        description="Where held-out rows are from: data.validation, or those rows of data.train "
        "that come after the step, where there are no others.",
    )
    held_out_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per held-out micro-batch of one rank, padding included, but at least "
        "one row: fewer, larger ones gather the model's weights less often, and keep no graph. "
        "None: train.micro_batch_size rows. The values are the same but for rounding.",
    )
    refresh_every: int = Field(
        1,
        ge=1,
        description="Optimizer steps between refreshes of the held-out signals; with 1 they "
        "are never "
        "out of date.",
    )
    contraction: Literal["auto", "ghost", "materialised"] = Field(
        "auto",
        description="How target terms are contracted; auto takes the cheaper per linear. The "
        "values are "
        "the same.",
    )
    start_step: int = Field(
        0,
        ge=0,
        description="Optimizer steps that train on every response token, unvalued, before the "
        "first that values and selects; a multiple of refresh_every.",
    )
    split_terms: bool = Field(
        True,
        description="Report the terms separately (exact has two, direct ones); false computes the "
        "composite only.",
    )
    chunk_tokens: int = Field(
        16384,
        ge=1,
        description="Tokens per scoring pass (whole sequences, at least one): bounds "
        "scoring's memory.",
    )
    residency: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="Keep the scored layers' weights and directions on every rank, or gather "
        "one layer at a "
        "time: "
        "slower, small; auto keeps them for ghost and streams them for exact.",
    )
    balance: Literal["none", "std"] = Field(
        "none",
        description="std divides adaptation and stability by their running standard "
        "deviations before they "
        "are added; "
        "none adds them as published, whatever their scales.",
    )
    fisher: FilePath | None = Field(
        None,
        description="Diagonal Fisher of the reference model (recipes/fisher.py makes such a "
        "folder; or "
        "safetensors by "
        "parameter name); default: estimated before training as section `fisher` says, unless "
        "stability_weight is 0.",
    )
    reference: FilePath | None = Field(
        None, description="Folder of the stability reference model; default: the starting weights."
    )

    @property
    def is_resident(self) -> bool:
        return self.residency == "resident" or (
            self.residency == "auto" and ESTIMATORS[self.estimator].is_resident
        )

    @property
    def contrast_source(self) -> str | None:
        """Where a run's B comes from; None without contrast."""
        if self.contrast == 0:
            return None
        if self.contrast_from == "auto":
            first, *_ = ESTIMATORS[self.estimator].contrast_sources
            return "drawn" if first == "scored" and self.target == "preference" else first
        return self.contrast_from

    @model_validator(mode="after")
    def _contrast_is_complete(self) -> ValuationConfig:
        memory = type(self).model_fields["contrast_memory"].default
        if self.contrast == 0 and (self.contrast_from, self.contrast_memory) != ("auto", memory):
            raise ValueError(
                f"valuation.contrast_from={self.contrast_from} and "
                f"valuation.contrast_memory={self.contrast_memory} are read with contrast only: "
                f"set valuation.contrast above 0, or leave them out (auto and {memory})"
            )
        sources = ESTIMATORS[self.estimator].contrast_sources
        source = self.contrast_source
        if source is not None and source not in sources:
            raise ValueError(
                f"valuation.contrast_from={source} needs valuation.estimator="
                f"{' or '.join(with_contrast_from(source))}; with {self.estimator} use "
                f"{' or '.join(sources)}"
            )
        if self.contrast_source == "scored" and self.target == "preference":
            raise ValueError(
                "valuation.contrast_from=scored adds up signals before a pair's losses are known, "
                "which valuation.target=preference needs; use drawn"
            )
        if self.contrast_source != "scored" and self.contrast_memory != memory:
            raise ValueError(
                f"valuation.contrast_memory={self.contrast_memory} is read with "
                f"contrast_from=scored only, not with {self.contrast_source}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _halves_have_rows(self) -> ValuationConfig:
        if self.reliability and self.validation_sequences < 2:
            raise ValueError(
                f"valuation.reliability=true compares two halves of the held-out rows, but "
                f"valuation.validation_sequences={self.validation_sequences}: set at least 2 (or, "
                "where reliability is on because nothing says what is kept, selection.keep_ratio)"
            )
        return self

    @model_validator(mode="after")
    def _starts_with_a_refresh(self) -> ValuationConfig:
        if self.start_step % self.refresh_every:
            raise ValueError(
                f"valuation.start_step={self.start_step} is not a multiple of "
                f"valuation.refresh_every={self.refresh_every}: the first valued step would have "
                "no held-out signals"
            )
        return self

    @model_validator(mode="after")
    def _estimator_reads_its_keys(self) -> ValuationConfig:
        own = ESTIMATORS[self.estimator].keys
        foreign = [key for key in keys_of_some() if key not in own]
        defaults = {key: type(self).model_fields[key].default for key in foreign}
        wrong = [key for key in foreign if getattr(self, key) != defaults[key]]
        if wrong:
            settings = " and ".join(f"valuation.{key}={getattr(self, key)}" for key in wrong)
            raise ValueError(
                f"{settings}: only valuation.estimator={' or '.join(readers_of(wrong))} reads "
                f"this; with {self.estimator} leave it out (or at "
                f"{', '.join(f'{key}={defaults[key]}' for key in wrong)})"
            )
        return self
