"""The configuration of a training run: its sections, and the checks that need more than one of
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from alphatoken.config.estimators import ESTIMATORS
from alphatoken.config.evaluation import Better, EvaluationConfig, EvaluationTask
from alphatoken.config.merging import merged
from alphatoken.config.policies import POLICY_TRAITS, Need
from alphatoken.config.sections import (
    MAY_CHANGE,
    DataConfig,
    FisherConfig,
    ModelConfig,
    ReferenceConfig,
    ReferenceMode,
    Section,
    as_reference,
)
from alphatoken.config.selection import Normalise, SelectionConfig
from alphatoken.config.training import (
    DeepSpeedConfig,
    LoggingConfig,
    OptimConfig,
    TrainConfig,
)
from alphatoken.config.valuation import ValuationConfig
from alphatoken.config.weights import WEIGHT_TRAITS

DROP_HARMFUL: dict[str, dict[str, Any]] = {
    "valuation": {"contrast": 0.75, "contrast_from": "drawn", "reliability": True},
    "selection": {
        "policy": "top_value",
        "keep_ratio": "auto",
        "veto": {"by": "probability", "threshold": 1.0e-4},
    },
}
"""What `configs/presets/drop_harmful.yaml` chooses tokens by: the default of supervised runs, as
measured in docs/results.md, "Study A"."""


def _names_another_rule(selection: Mapping[str, Any]) -> bool:
    """Whether the given keys of section `selection` say by themselves which tokens are kept, so
    that what is left out is as published."""
    return (
        selection.get("keep_ratio") not in (None, "auto")
        or selection.get("threshold") is not None
        or selection.get("policy") not in (None, "top_value")
        or selection.get("weights") not in (None, "hard")
        or selection.get("schedule") not in (None, "constant")
    )


def _given(section: Any) -> dict[str, Any] | None:
    """The keys of a section that were given; None of what is none."""
    if isinstance(section, Section):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return section if isinstance(section, dict) else None


def _with_default_choice(
    valuation: dict[str, Any], selection: dict[str, Any], choice: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Two sections as far as they are given, with `choice` for what they leave out, where it can be
    meant."""
    given = {
        "valuation": valuation,
        # null is no rule; of the veto it says that there is none.
        "selection": {k: v for k, v in selection.items() if v is not None or k == "veto"},
    }
    name = valuation.get("estimator", "ghost")
    estimator = ESTIMATORS.get(name) if isinstance(name, str) else None
    is_meant = (
        valuation.get("enabled") is not False
        and valuation.get("held_out") != "train"  # G and B would be of the same rows
        and not _names_another_rule(selection)
        and estimator is not None
        and choice["valuation"].keys() <= {*estimator.keys}
        and choice["valuation"]["contrast_from"] in estimator.contrast_sources
    )
    if not is_meant:
        return {"valuation": valuation, "selection": selection}
    both = merged(choice, given)
    if not both["valuation"]["contrast"] and "contrast_from" not in valuation:
        del both["valuation"]["contrast_from"]
    return both


class RunConfig(Section):
    """What every training recipe needs."""

    default_choice: ClassVar[dict[str, dict[str, Any]]] = DROP_HARMFUL
    """What is left out of `valuation` and `selection` is taken from, unless another rule is named;
    empty: from their own defaults. It also holds for sections that are given as objects."""

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

    @model_validator(mode="before")
    @classmethod
    def _chooses_by_what_was_measured(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.default_choice:
            return values
        valuation, selection = (_given(values.get(each, {})) for each in cls.default_choice)
        if valuation is None or selection is None:
            return values  # a mistake that is told later
        return {**values, **_with_default_choice(valuation, selection, cls.default_choice)}

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
            _check_selection(selection, policy, self.valuation.balance)
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


def _check_selection(selection: SelectionConfig, policy: str, balance: str) -> None:
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
        if name == "adaptation" and balance == "std":
            raise ValueError(
                f"{key}=noise with adaptation and valuation.balance=std would compare adaptation "
                "with the noise of balanced values: set the unit to value, or balance to none"
            )
