"""The four terms against the float64 oracle, on every supported architecture."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken import TokenValues, UserError, ValuationConfig, score_tokens
from alphatoken.models.decoder import decoder_of
from alphatoken.values.registry import valuation_notes
from tests.oracle import Scored, Sequences, relative_error, token_values
from tests.tiny import (
    CASES,
    TinyCase,
    by_architecture,
    collate,
    pack,
    random_sequences,
    scored_linears,
    unpack,
    unpad,
)

LENGTHS = [(3, 9), (5, 4), (2, 14), (6, 1)]
VALIDATION_LENGTHS = [(4, 6), (2, 11), (7, 3)]
TERMS = ("direct_target", "causal_target", "direct_proxy", "causal_proxy", "composite")


def scored_set(case: TinyCase, model: PreTrainedModel, depth: int) -> Scored:
    linears = scored_linears(case, model, depth)
    return Scored(
        linears=linears,
        values={name: case.value_rows for name in linears if name.endswith(f"{case.value}.weight")},
        attention={
            layer: f"{case.layer_prefix}.{layer}.{case.attention}"
            for name, layer in linears.items()
            if name.endswith(f"{case.value}.weight")
        },
        transposed=case.transposed,
    )


def stability(
    model: PreTrainedModel, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random Fisher and a reference a little away from the model."""
    generator = torch.Generator().manual_seed(7)
    fisher, reference = {}, {}
    for name in names:
        weight = model.get_parameter(name).detach()
        fisher[name] = torch.rand(weight.shape, generator=generator)
        reference[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    return fisher, reference


class Setting:
    """One model with its data, its stability tensors and what the oracle says."""

    def __init__(self, case: TinyCase, window: int, sequences: Sequences | None = None) -> None:
        self.model = case.build()
        self.scored = scored_set(case, self.model, depth=2)
        self.fisher, self.reference = stability(self.model, list(self.scored.linears))
        self.sequences = random_sequences(LENGTHS, seed=1) if sequences is None else sequences
        self.validation = random_sequences(VALIDATION_LENGTHS, seed=2)
        self.window = window
        self.expected = token_values(
            self.model,
            self.sequences,
            self.validation,
            scored=self.scored,
            window=window,
            stability_weight=1.5,
            fisher=self.fisher,
            reference=self.reference,
        )

    def score(
        self, batch: dict[str, Tensor], validation: dict[str, Tensor], **config: object
    ) -> TokenValues:
        settings = ValuationConfig.model_validate({"layers": 2, "window": self.window, **config})
        return score_tokens(
            self.model,
            batch,
            validation,
            fisher=self.fisher,
            reference=self.reference,
            config=settings,
        )

    def check(self, values: dict[str, list[Tensor]], tolerance: float = 1e-4) -> None:
        for term in TERMS:
            error = relative_error(
                torch.cat(values[term]), torch.cat([row[term] for row in self.expected])
            )
            assert error <= tolerance, f"{term} is off by {error:.1e}"


@pytest.mark.parametrize("name", by_architecture())
def test_every_architecture_matches_the_oracle(name: str) -> None:
    case = CASES[name]
    setting = Setting(case, window=4)
    for attention in ["eager"] if case.eager_only else ["eager", "sdpa"]:
        setting.model.set_attn_implementation(attention)
        for contraction in ("ghost", "materialised"):
            for side in ("right", "left"):
                values = setting.score(
                    collate(setting.sequences, side),
                    collate(setting.validation, side),
                    contraction=contraction,
                )
                setting.check(
                    {term: unpad(getattr(values, term), setting.sequences, side) for term in TERMS}
                )
            if case.packable:
                values = setting.score(
                    pack(setting.sequences, 2), pack(setting.validation, 1), contraction=contraction
                )
                setting.check(
                    {term: unpack(getattr(values, term), setting.sequences, 2) for term in TERMS}
                )


def with_adapters(case: TinyCase, model: PreTrainedModel, wrapped: bool) -> PreTrainedModel:
    """The model with random LoRA adapters on the scored linears of all layers."""
    targets = sorted({path.rsplit(".", 1)[-1] for path in case.linears})
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=case.transposed
    )
    torch.manual_seed(1)
    adapted: PreTrainedModel
    if wrapped:
        adapted = peft.get_peft_model(model, settings)
    else:
        model.add_adapter(settings)
        adapted = model
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


def adapter_set(case: TinyCase, model: PreTrainedModel, depth: int) -> Scored:
    linears: dict[str, int] = {}
    values: dict[str, Sequence[int] | None] = {}
    through: dict[str, str] = {}
    for base, layer in scored_linears(case, model, depth, suffix=".base_layer.weight").items():
        path = base.removesuffix(".base_layer.weight")
        down, up = (f"{path}.lora_{part}.default.weight" for part in "AB")
        linears |= {down: layer, up: layer}
        if path.endswith(case.value):
            values[up] = case.value_rows
            through[down] = up
    attention = {
        layer: f"{case.layer_prefix}.{layer}.{case.attention}" for layer in set(linears.values())
    }
    return Scored(linears, values, attention, through)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", by_architecture(["llama", "phi3", "gpt_neox", "gpt2", "mixtral"]))
def test_lora_scores_the_adapters(name: str, wrapped: bool) -> None:
    case = CASES[name]
    model = with_adapters(case, case.build(), wrapped)
    base = model.get_base_model() if wrapped else model
    scored = adapter_set(case, base, depth=2)
    assert len(scored.linears) == 2 * 2 * len(case.linears)
    fisher, reference = stability(base, list(scored.linears))
    sequences, validation = (
        random_sequences(LENGTHS, seed=1),
        random_sequences(VALIDATION_LENGTHS, seed=2),
    )
    expected = token_values(
        base,
        sequences,
        validation,
        scored=scored,
        window=4,
        stability_weight=1.5,
        fisher=fisher,
        reference=reference,
    )
    config = ValuationConfig(layers=2, window=4)
    actual = score_tokens(
        model,
        collate(sequences),
        collate(validation),
        fisher=fisher,
        reference=reference,
        config=config,
    )
    for term in TERMS:
        rows = torch.cat(unpad(getattr(actual, term), sequences))
        assert rows.any(), term
        error = relative_error(rows, torch.cat([row[term] for row in expected]))
        assert error <= 1e-4, f"{term} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", []),
        ("mixtral", ["mlp.experts and mlp.gate of the scored layers are trained but not scored"]),
        ("qwen3_5", ["no causal term from layers without an attention matrix: 1, 3"]),
    ],
)
def test_what_valuation_leaves_out_is_said(name: str, expected: list[str]) -> None:
    decoder = decoder_of(CASES[name].build())
    assert valuation_notes(decoder, ValuationConfig(layers=3)) == expected


def test_halves_and_drift_that_would_say_nothing_are_refused() -> None:
    model = CASES["llama"].build()
    batch = collate(random_sequences(LENGTHS, seed=1))
    one = collate(random_sequences([(3, 9)], seed=2))
    config = ValuationConfig(reliability=True, contrast=1.0)
    with pytest.raises(UserError, match="compares two halves of `contrast`"):
        score_tokens(model, batch, batch, contrast=one, config=config)
    with pytest.raises(UserError, match="compares two halves of `validation`"):
        score_tokens(model, batch, one, contrast=batch, config=config)
    weights = {name: each.detach() for name, each in model.named_parameters()}
    with pytest.raises(UserError, match="in float16, in which the drift"):
        score_tokens(model.half(), batch, batch, fisher=weights, reference=weights)
