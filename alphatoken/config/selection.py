"""Section `selection`: which response tokens are trained on, and how they are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from alphatoken.config.policies import POLICY_TRAITS, PolicyName
from alphatoken.config.sections import MAY_CHANGE, FilePath, Section
from alphatoken.config.weights import WEIGHT_TRAITS, WeightsName

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
        description="What is kept: "
        + "; ".join(f"{name}, {traits.keeps}" for name, traits in POLICY_TRAITS.items())
        + ". Default: top_value, or all where valuation is off.",
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
        "and valuation.reliability. null where threshold is set. In runs on responses it is auto, "
        "with what configs/presets/drop_harmful.yaml has besides, unless another rule is named: a "
        "ratio, a threshold, or another policy, weights or schedule.",
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
    store: FilePath | None = Field(
        None,
        description="Folder of token values that recipes/value_tokens.py writes (default: values "
        "in train.output_dir) and policy stored reads.",
        json_schema_extra=MAY_CHANGE,
    )

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


def replaced_by(overrides: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    """Keys of a selection `before` that mean nothing beside what overrides it, as they belong to
    the other rule; `overrides` are keys that have a value."""
    replaced: set[str] = set()
    if "keep_ratio" in overrides:
        replaced |= {"threshold", "threshold_unit"}
    if overrides.get("keep_ratio", "auto") != "auto" or "threshold" in overrides:
        replaced.add("auto_margin")
    if "threshold" in overrides:
        replaced.add("keep_ratio")
    if "threshold" in overrides or overrides.get("keep_ratio") == "auto":
        replaced.add("schedule")
    if "schedule" in replaced or overrides.get("schedule") == "constant":
        replaced |= {"keep_ratio_start", "schedule_steps"}
    weights = overrides.get("weights")
    if weights is not None and before.get("weights", weights) != weights:
        replaced.add("weight_parameters")
    return replaced & before.keys() - overrides.keys()


def replaced_by_veto(overrides: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    """Keys of a veto `before` that mean nothing beside what overrides it: all beside another thing
    to go by, and those of the other number; `overrides` are keys that have a value."""
    if "by" in overrides:
        return set(before)
    replaced: set[str] = set()
    if "share" in overrides:
        replaced |= {"threshold", "unit"}
    if "threshold" in overrides:
        replaced.add("share")
    return replaced & before.keys() - overrides.keys()
