"""Run configuration: one frozen pydantic model per YAML section. Unknown keys are errors; every
field says why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    model_validator,
)

from alphatoken.config.estimators import ESTIMATORS, EstimatorName, keys_of_some, readers_of
from alphatoken.config.policies import POLICY_TRAITS, PolicyName
from alphatoken.config.weights import WEIGHT_TRAITS, WeightsName

# Strictness keeps `every: true` from meaning 1; YAML has no paths or tuples, so those are read
# from text and lists.
FilePath = Annotated[Path, Strict(False)]
Pair = Annotated[tuple[float, float], Strict(False)]

Schedule = Literal["constant", "linear", "cosine"]
"""How the keep ratio moves."""
Scope = Literal["sequence", "micro_batch", "global_batch"]
"""Among which tokens the best are chosen."""
ThresholdUnit = Literal["raw", "noise"]
"""Whether a threshold is a sort key, or counts in the noise of values."""
Normalise = Literal["kept", "response"]
"""Which tokens' number the sum of losses is divided by."""
KeepRatio = Annotated[float, Field(gt=0, le=1)] | Literal["auto"]
"""A share of the response tokens, or what reliability decides."""

# Marks a key, or a section with all its keys, that a run and its continuation may have
# different values of, as it does not change what is computed (`config.file.may_change`).
MAY_CHANGE: dict[str, JsonValue] = {"may_change": True}


class Section(BaseModel):
    """A frozen section; `read_config` turns its validation errors into messages that name the
    nearest key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraConfig(Section):
    r: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(
        16.0, gt=0, description="Scale of the adapters: they are multiplied by alpha / r."
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the linears that get an adapter."
    )


class ModelConfig(Section):
    """The model that is trained, and how it is loaded."""

    name_or_path: str = Field(
        description="Folder or hub name of the Hugging Face model to fine-tune."
    )
    chat_template: FilePath | None = Field(
        None,
        description="Jinja file to use as the tokenizer's chat template; for base models, "
        "which have "
        "none.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="Attention kernel of the training forward pass; values are the same with each.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train LoRA adapters {r, alpha, target_modules} instead of all weights; "
        "they are "
        "then scored.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Dtype of weights and activations; the optimizer keeps float32 "
        "masters either way.",
    )


class Source(Section):
    """One file, folder or hub data set, and which of its rows are used."""

    path: str = Field(
        description="File (.jsonl, .jsonl.gz, .parquet), saved dataset or `datasets` name; "
        "${VARIABLES} "
        "are filled in."
    )
    skip: int = Field(0, ge=0, description="Rows to leave out at the start.")
    first: int | None = Field(
        None, ge=1, description="Rows to use after those skipped; default: all."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Relative share of an epoch's rows; leave unset on all sources to "
        "use every row once.",
    )
    split: str = Field("train", description="Split of a `datasets` name.")
    subset: str | None = Field(None, description="Configuration of a `datasets` name.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our field to the source's, as in {prompt: problem, response: solution}.",
    )


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


# One path, one {path, weight, ...} mapping, or a list of either.
Sources = Annotated[list[Source], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Rows to train on, to steer values by and to evaluate on, and how they are tokenised."""

    train: Sources = Field(
        description="Rows to train on: a path, or a list of {path, weight} for a mixture."
    )
    validation: Sources | None = Field(
        None,
        description="Held-out rows of the target task that steer the token values; never "
        "trained on.",
    )
    eval: Sources | None = Field(
        None,
        description="Rows for eval_loss, disjoint from train and validation, so that the report is "
        "honest.",
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Longest supervised row in tokens; longer ones are cut on the right "
        "and counted.",
    )
    packing: bool = Field(
        False,
        description="Lay the documents of a micro-batch into as few rows as fit max_length, "
        "instead of "
        "padding.",
    )
    cache_dir: FilePath = Field(
        Path("~/.cache/alphatoken"),
        description="Where tokenised data is kept, shared by runs and ranks.",
        json_schema_extra=MAY_CHANGE,
    )


class ValuationConfig(Section):
    """How values of response tokens are computed."""

    enabled: bool = Field(
        True, description="Value tokens and train on the valuable ones; false is plain fine-tuning."
    )
    estimator: EstimatorName = Field(
        "ghost",
        description="How values are estimated: the paper's contractions, or the true "
        "first-order effect of "
        "each token "
        "by forward-mode differentiation.",
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
        "validation_sequences, those of the next steps, at every refresh, and moment Adam's first "
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
    def contrast_source(self) -> Literal["scored", "drawn", "moment"] | None:
        """Where a run's B comes from; None without contrast."""
        if self.contrast == 0:
            return None
        if self.contrast_from == "auto":
            adds_up = "contrast_memory" in ESTIMATORS[self.estimator].keys
            return "scored" if adds_up and self.target == "sft" else "drawn"
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
        if self.contrast_source == "scored" and self.estimator != "ghost":
            raise ValueError(
                f"valuation.contrast_from=scored needs valuation.estimator=ghost, whose signals it "
                f"adds up; with {self.estimator} use drawn"
            )
        if self.contrast_source == "scored" and self.target == "preference":
            raise ValueError(
                "valuation.contrast_from=scored adds up signals before a pair's losses are known, "
                "which valuation.target=preference needs; use drawn"
            )
        if self.contrast_source == "moment" and self.estimator != "exact":
            raise ValueError(
                f"valuation.contrast_from=moment needs valuation.estimator=exact; with "
                f"{self.estimator} use scored"
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
                f"valuation.validation_sequences={self.validation_sequences}: set at least 2"
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


class FisherConfig(Section):
    """How the Fisher of the starting model is estimated, and where it is kept."""

    prompts: Sources | None = Field(
        None,
        description="Rows whose prompts the reference model answers, never trained on; default: "
        "data.validation.",
    )
    num_prompts: int = Field(1000, ge=1, description="Use at most so many of them (N).")
    sampling: Literal["rollout", "teacher_forced", "empirical"] = Field(
        "rollout",
        description="Whose tokens the gradients are of: completions sampled from the model, "
        "tokens it "
        "predicts along "
        "given responses (no generation), or the given responses themselves.",
    )
    square: Literal["token", "sequence"] = Field(
        "token",
        description="Square each position's gradient (published), or each sequence's: "
        "the true diagonal.",
    )
    max_prompt_tokens: int = Field(
        256, ge=1, description="Longest prompt of a rollout; longer ones are left out."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest sampled completion of a rollout.")
    batch_size: int = Field(8, ge=1, description="Prompts per pass on one rank.")
    seed: int = Field(
        0, ge=0, description="Seed of the choice of prompts and of the sampled tokens."
    )
    save_every: int = Field(
        32,
        ge=1,
        description="Passes after which an unfinished estimate is saved.",
        json_schema_extra=MAY_CHANGE,
    )
    output: FilePath | None = Field(
        None,
        description="Folder the estimate is written to; default: train.output_dir/fisher.",
        json_schema_extra=MAY_CHANGE,
    )


class VetoConfig(Section):
    """What is never trained on, before the policy ranks the rest."""

    by: PolicyName = Field(description="Policy whose sort key rules tokens out; not random or all.")
    threshold: float | None = Field(
        None, description="Tokens whose sort key lies below it are never trained on."
    )
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the response tokens of a scope that is never trained on: those with "
        "the lowest sort keys.",
    )
    unit: ThresholdUnit = Field(
        "raw",
        description="noise multiplies the threshold by the noise of values, the root mean square "
        "of their spread over a scope; needs valuation.reliability.",
    )

    @model_validator(mode="after")
    def _rules_out_by_one_number(self) -> VetoConfig:
        if (self.threshold is None) == (self.share is None):
            raise ValueError(
                f"selection.veto has threshold={self.threshold} and share={self.share}: set "
                "exactly one of them"
            )
        if self.unit == "noise" and self.threshold is None:
            raise ValueError("selection.veto.unit=noise: only selection.veto.threshold has a unit")
        traits = POLICY_TRAITS[self.by]
        if traits.keeps_all or "noise" in traits.needs:
            raise ValueError(
                f"selection.veto.by={self.by} says nothing of a token; choose a policy that does"
            )
        return self


class SelectionConfig(Section):
    """Which response tokens are trained on."""

    policy: PolicyName | None = Field(
        None,
        description="What is kept: highest value, its adaptation part alone, highest value in the "
        "kinder half of the held-out rows (agreement), a random choice, highest or lowest loss, "
        "highest probability under the model or the reference, highest loss above that of "
        "reference.model (Rho-1), or below that of reference.model or the start (retrospective), "
        "lowest probability of those below their response's mean (ConfPO), or everything; "
        "default: top_value, or all where valuation is off.",
    )
    veto: VetoConfig | None = Field(
        None,
        description="Tokens {by, threshold, unit} or {by, share} that are never trained on; the "
        "policy ranks the rest.",
    )
    keep_ratio: KeepRatio | None = Field(
        0.5,
        description="Share of response tokens to train on (rho). auto trains on all but those that "
        "both halves of the held-out rows call harmful beyond the noise; needs policy top_value "
        "and valuation.reliability. null where threshold is set.",
    )
    auto_margin: float = Field(
        1.0,
        ge=0,
        description="keep_ratio auto: how far beyond zero a token must be harmful, as a multiple "
        "of the noise of values.",
    )
    threshold: float | None = Field(
        None,
        description="Train on tokens whose sort key is at least this, instead of a share; 0 with "
        "top_value drops what is harmful.",
    )
    threshold_unit: ThresholdUnit = Field(
        "raw",
        description="noise multiplies the threshold by the noise of values; needs "
        "valuation.reliability.",
    )
    schedule: Schedule = Field(
        "constant", description="How the ratio moves from keep_ratio_start to keep_ratio."
    )
    keep_ratio_start: float | None = Field(
        None, gt=0, le=1, description="First ratio of a linear or cosine schedule."
    )
    schedule_steps: int | None = Field(
        None, ge=1, description="Optimizer steps of the schedule; default: the whole run."
    )
    scope: Scope = Field(
        "micro_batch",
        description="Among which tokens the best are chosen. micro_batch is the published choice; "
        "global_batch scores "
        "the whole optimizer step first, at the price of another forward pass.",
    )
    weights: WeightsName = Field(
        "hard",
        description="How kept tokens are weighed: all alike, by the sigmoid of their standardised "
        "value, by its softmax with mean 1, by a power of the probability (DFT; TALR with its own "
        "temperature), by entropy (EAFT), or by a softmax of the values of each sequence (gibbs).",
    )
    weight_parameters: dict[str, float] = Field(
        default_factory=dict,
        description="Numbers of the rule of weights, as in {temperature: 0.5} of softmax or "
        "{power: 1.0} of dft.",
    )
    normalise: Normalise | None = Field(
        None,
        description="Divide the sum of weighed losses by the number of kept tokens or of all "
        "response tokens; default: kept, but response where a veto, a threshold or auto decides "
        "how many are kept.",
    )
    protect_eos: bool = Field(
        False, description="Keep end-of-turn tokens first, so that the model still learns to stop."
    )
    min_keep: int = Field(0, ge=0, description="Keep at least this many tokens of every response.")

    @model_validator(mode="before")
    @classmethod
    def _threshold_replaces_the_ratio(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("threshold") is not None:
            return {"keep_ratio": None, **values}
        return values

    @property
    def ratio(self) -> float:
        """The keep ratio; 1 where a threshold or reliability decides."""
        return self.keep_ratio if isinstance(self.keep_ratio, float | int) else 1.0

    @property
    def count_follows_from_labels(self) -> bool:
        """Whether the number of kept tokens is known before anything is known of them."""
        return self.veto is None and self.threshold is None and self.keep_ratio != "auto"

    @model_validator(mode="after")
    def _one_rule_decides_how_many(self) -> SelectionConfig:
        if (self.keep_ratio is None) == (self.threshold is None):
            raise ValueError(
                f"selection.keep_ratio={self.keep_ratio} and selection.threshold={self.threshold}: "
                "set one of them and leave the other out"
            )
        if self.threshold is None and self.threshold_unit != "raw":
            raise ValueError(
                f"selection.threshold_unit={self.threshold_unit}, but there is no "
                "selection.threshold"
            )
        margin = type(self).model_fields["auto_margin"].default
        if self.keep_ratio != "auto" and self.auto_margin != margin:
            raise ValueError(
                f"selection.auto_margin={self.auto_margin}: only selection.keep_ratio=auto reads "
                "this"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> SelectionConfig:
        if (self.schedule == "constant") != (self.keep_ratio_start is None):
            raise ValueError(
                f"selection.schedule={self.schedule} and "
                f"selection.keep_ratio_start={self.keep_ratio_start} do not go together: a linear "
                "or cosine schedule needs a start, a constant one has none"
            )
        if self.schedule == "constant" and self.schedule_steps is not None:
            raise ValueError(
                "selection.schedule_steps is given, but selection.schedule is constant"
            )
        if self.schedule != "constant" and not isinstance(self.keep_ratio, float | int):
            raise ValueError(
                f"selection.schedule={self.schedule} moves a share, but "
                f"selection.keep_ratio={self.keep_ratio}: set a number, or no schedule"
            )
        return self

    @model_validator(mode="after")
    def _weights_go_with_the_rest(self) -> SelectionConfig:
        traits = WEIGHT_TRAITS[self.weights]
        if traits.weighs_all and (
            self.ratio != 1
            or self.schedule != "constant"
            or (self.min_keep and self.count_follows_from_labels)
        ):
            raise ValueError(
                f"selection.weights={self.weights} weighs every response token: set "
                "selection.keep_ratio=1.0, no schedule and no min_keep"
            )
        unknown = sorted(set(self.weight_parameters) - set(traits.parameters))
        if unknown:
            known = ", ".join(traits.parameters) or "none"
            raise ValueError(
                f"selection.weight_parameters has {', '.join(unknown)}; those of "
                f"selection.weights={self.weights}: {known}"
            )
        for name, least in traits.at_least.items():
            if self.weight_parameters.get(name, least) < least:
                raise ValueError(
                    f"selection.weight_parameters.{name}={self.weight_parameters[name]}: "
                    f"selection.weights={self.weights} needs at least {least:g}"
                )
        return self

    @model_validator(mode="after")
    def _normaliser_is_known_in_time(self) -> SelectionConfig:
        known = self.count_follows_from_labels or self.scope == "global_batch"
        if self.normalise == "kept" and not known:
            keys = {
                "veto": self.veto is not None,
                "threshold": self.threshold is not None,
                "keep_ratio=auto": self.keep_ratio == "auto",
            }
            deciding = " and ".join(f"selection.{key}" for key, is_set in keys.items() if is_set)
            raise ValueError(
                f"selection.normalise=kept with {deciding}: how many tokens are kept is not known "
                "before the first backward pass; set selection.normalise=response or "
                "selection.scope=global_batch"
            )
        return self


class ReferenceConfig(Section):
    """The model whose token losses are compared with, and where its losses are kept."""

    model: str | None = Field(
        None,
        description="Folder or hub name of the model whose token losses are compared; "
        "default: the start.",
    )
    mode: Literal["cached", "online"] = Field(
        "cached",
        description="Compute its losses of all rows once, before training, or keep it loaded "
        "(sharded like "
        "the model) "
        "and run it on every micro-batch.",
    )
    offload: bool = Field(
        False,
        description="online: keep its shards in host memory while it does not run.",
        json_schema_extra=MAY_CHANGE,
    )
    cache: FilePath | None = Field(
        None,
        description="Folder of the cached losses, refused if it is of other data, lengths, "
        "tokenizer or "
        "model; "
        "default: one under data.cache_dir for each combination of these.",
        json_schema_extra=MAY_CHANGE,
    )
    save_every: int = Field(
        1024,
        ge=1,
        description="Rows after which unfinished cached losses are saved.",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _mode_reads_its_keys(self) -> ReferenceConfig:
        if self.offload and self.mode == "cached":
            raise ValueError(
                "reference.offload=true: only reference.mode=online keeps a reference to offload"
            )
        if self.cache is not None and self.mode == "online":
            raise ValueError(f"reference.cache={self.cache}: reference.mode=online caches nothing")
        return self


def as_reference(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value
