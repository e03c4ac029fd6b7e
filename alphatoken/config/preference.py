"""Configuration of preference runs: what `config.RunConfig` has, and the objective on pairs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from alphatoken.config.evaluation import Better
from alphatoken.config.objectives import (
    OBJECTIVE_TRAITS,
    OPTIONAL_KEYS,
    ObjectiveName,
    ObjectiveTraits,
)
from alphatoken.config.policies import PolicyName
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Section
from alphatoken.config.selection import (
    KeepRatio,
    Schedule,
    SelectionConfig,
    ThresholdUnit,
    VetoConfig,
    replaced_by,
)
from alphatoken.config.weights import WeightsName

BranchName = Literal["chosen", "rejected"]
BRANCHES: tuple[BranchName, ...] = ("chosen", "rejected")


class PreferenceConfig(Section):
    """What is minimised on pairs, and how long prompts and responses may be."""

    objective: ObjectiveName = Field(
        "alpha_dpo",
        description="What is minimised over pairs, from sums over kept tokens: "
        + "; ".join(f"{name}, {traits.loss}" for name, traits in OBJECTIVE_TRAITS.items())
        + ". docs/preference.md says which need a reference.",
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Scale of the log-ratios (IPO: inverse gap; ORPO: weight of the odds "
        "ratio); default: the objective's own, 0.1 for most (docs/preference.md).",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs whose labels are swapped (conservative DPO).",
    )
    margin: float = Field(
        0.5, ge=0, description="By how much SimPO wants the chosen reward to be higher (gamma)."
    )
    nll_weight: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Weight of the mean loss of the chosen response's kept tokens, added to "
        "the objective; default: the objective's own, 0 for most (docs/preference.md).",
    )
    normalisation: Literal["sum", "mean_kept"] = Field(
        "sum",
        description="alpha_dpo: sum the kept tokens' losses of a branch (the published "
        "equation, and DPO's "
        "gradient "
        "when all are kept) or take their mean (the published code).",
    )
    length_decay: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Count tokens beyond the length of the pair's shorter response so much in "
        "the model's log-probability (LD-DPO's alpha); 1 counts them in full.",
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Longest prompt of a pair; longer ones lose their start."
    )
    max_response_tokens: int = Field(
        1024, ge=1, description="Longest response; longer ones are cut on the right."
    )

    @model_validator(mode="after")
    def _objective_reads_its_keys(self) -> PreferenceConfig:
        for key in OPTIONAL_KEYS:
            value = getattr(self, key)
            is_default = value == type(self).model_fields[key].default
            if not is_default and key not in self._traits.reads:
                readers = [name for name, traits in OBJECTIVE_TRAITS.items() if key in traits.reads]
                raise ValueError(
                    f"preference.{key}={value}: only preference.objective={' or '.join(readers)} "
                    f"reads this, not {self.objective}"
                )
        return self

    @model_validator(mode="after")
    def _length_decay_has_no_mean_beside_it(self) -> PreferenceConfig:
        if self.length_decay != 1 and self.chosen_nll_weight:
            raise ValueError(
                f"preference.length_decay={self.length_decay} and preference.nll_weight="
                f"{self.chosen_nll_weight} do not go together: the mean loss would be of decayed "
                "losses; set nll_weight=0"
            )
        return self

    @property
    def _traits(self) -> ObjectiveTraits:
        return OBJECTIVE_TRAITS[self.objective]

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with the token losses of a reference model."""
        return self._traits.needs_reference

    @property
    def scale(self) -> float:
        """`beta`, or the objective's default."""
        return self._traits.default_beta if self.beta is None else self.beta

    @property
    def chosen_nll_weight(self) -> float:
        """`nll_weight`, or the objective's default."""
        return self._traits.default_nll_weight if self.nll_weight is None else self.nll_weight


class BranchSelectionConfig(Section):
    """Overrides of `selection` for one branch of the pairs; keys that are not set are inherited."""

    policy: PolicyName | None = Field(None, description="As selection.policy, for this branch.")
    veto: VetoConfig | None = Field(
        None,
        description="As selection.veto, for this branch; replaces it as a whole. null inherits it; "
        "{by: probability, threshold: 0} rules nothing out.",
    )
    keep_ratio: KeepRatio | None = Field(
        None, description="As selection.keep_ratio, for this branch."
    )
    auto_margin: Annotated[float, Field(ge=0)] | None = Field(
        None, description="As selection.auto_margin, for this branch."
    )
    threshold: float | None = Field(None, description="As selection.threshold, for this branch.")
    threshold_unit: ThresholdUnit | None = Field(
        None, description="As selection.threshold_unit, for this branch."
    )
    schedule: Schedule | None = Field(None, description="As selection.schedule, for this branch.")
    keep_ratio_start: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="As selection.keep_ratio_start, for this branch."
    )
    schedule_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="As selection.schedule_steps, for this branch."
    )
    weights: WeightsName | None = Field(None, description="As selection.weights, for this branch.")
    weight_parameters: dict[str, float] | None = Field(
        None, description="As selection.weight_parameters, for this branch."
    )
    protect_eos: bool | None = Field(None, description="As selection.protect_eos, for this branch.")
    min_keep: Annotated[int, Field(ge=0)] | None = Field(
        None, description="As selection.min_keep, for this branch."
    )


class PairSelectionConfig(SelectionConfig):
    """How response tokens of pairs are chosen, for both branches and for each."""

    chosen: BranchSelectionConfig = Field(
        default_factory=BranchSelectionConfig,
        description="What differs for chosen responses, key by key.",
    )
    rejected: BranchSelectionConfig = Field(
        default_factory=BranchSelectionConfig,
        description="What differs for rejected responses, key by key.",
    )

    @model_validator(mode="after")
    def _pairs_are_counted(self) -> PairSelectionConfig:
        if self.normalise is not None:
            raise ValueError(
                f"selection.normalise={self.normalise}: the losses of pairs are divided by the "
                "number of pairs; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _overrides_go_with_the_rest(self) -> PairSelectionConfig:
        for name in BRANCHES:
            try:
                self.branch(name)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]
                raise ValueError(
                    f"selection.{name}: {reason.get('ctx', {}).get('error', reason['msg'])}"
                ) from None
        return self

    def branch(self, name: BranchName) -> SelectionConfig:
        """The complete settings of one branch."""
        shared = self.model_dump(exclude={"chosen", "rejected"})
        overrides = getattr(self, name).model_dump(exclude_none=True)
        for key in replaced_by(overrides, shared):
            shared.pop(key)
        return SelectionConfig.model_validate({**shared, **overrides})


class PreferenceRunConfig(RunConfig):
    """What `recipes/preference.py` needs."""

    default_choice: ClassVar[dict[str, dict[str, Any]]] = {}
    """As published: dropping what is harmful was not measured on pairs."""

    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    selection: PairSelectionConfig = Field(default_factory=PairSelectionConfig)

    @property
    def selections(self) -> tuple[SelectionConfig, ...]:
        return tuple(self.selection.branch(name) for name in BRANCHES)

    @property
    def trains_on_pairs(self) -> bool:
        return True

    @property
    def evaluated_metrics(self) -> dict[str, Better]:
        found = super().evaluated_metrics
        if self.data.eval is not None:
            found |= {"eval_rewards_accuracy": "higher", "eval_rewards_margin": "higher"}
        return found

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.preference.needs_reference
