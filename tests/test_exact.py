"""Estimator `exact` against explicit per-token gradients in float64, and its identity with the
ghost contraction."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken import TokenValues, UserError, ValuationConfig, score_tokens
from alphatoken.data.batches import Order
from alphatoken.distributed.adam_scale import adam_scale
from tests.exact_oracle import exact_values
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.runs import changed
from tests.test_valuation import LENGTHS, VALIDATION_LENGTHS, stability, with_adapters
from tests.tiny import (
    CASES,
    TinyCase,
    by_architecture,
    collate,
    pack,
    random_sequences,
    scored_linears,
    tokenised,
    unpack,
    unpad,
)

PARAMETERS = ("linears", "norms", "all")


def parameter_names(case: TinyCase, model: PreTrainedModel, depth: int, chosen: str) -> list[str]:
    """Written apart from `alphatoken.architectures`: by the names that parameters have."""
    names = [
        name
        for name, _ in model.named_parameters()
        if "vision" not in name and "multi_modal" not in name
    ]
    layers = model.config.get_text_config().num_hidden_layers
    own = [re.escape(f"{case.layer_prefix}.{layer}.") for layer in range(layers - depth, layers)]
    inside = [name for name in names if re.match("|".join(own), name)]
    outside = [name for name in names if not name.startswith(case.layer_prefix)]
    embeddings = [
        name
        for name in outside
        if re.search(r"embed|\.wte|\.wpe", name) and "embed_out" not in name
    ]
    if chosen == "linears":
        return list(scored_linears(case, model, depth))
    if chosen == "norms":
        final = [name for name in outside if re.search(r"norm|ln_f", name)]
        return [name for name in inside if re.search(r"norm|\.ln_\d", name)] + final
    return [*inside, *[name for name in outside if depth == layers or name not in embeddings]]


class Setting:
    """One model with what the oracle says about some of its parameters."""

    def __init__(self, name: str, depth: int | None, chosen: str) -> None:
        self.case = CASES[name]
        self.model = self.case.build()
        self.sequences, self.validation = (
            random_sequences(LENGTHS, 1),
            random_sequences(VALIDATION_LENGTHS, 2),
        )
        layers = self.model.config.get_text_config().num_hidden_layers
        names = parameter_names(self.case, self.model, depth or layers, chosen)
        self.config = {"estimator": "exact", "layers": depth or "all", "parameters": chosen}
        self.stability = dict(
            zip(("fisher", "reference"), stability(self.model, names), strict=True)
        )
        self.expected = exact_values(
            self.model,
            self.sequences,
            self.validation,
            names,
            fisher=self.stability["fisher"],
            reference=self.stability["reference"],
        )

    def score(
        self, batch: dict[str, Tensor], held_out: dict[str, Tensor], **config: Any
    ) -> TokenValues:
        settings = ValuationConfig.model_validate({**self.config, **config})
        return score_tokens(self.model, batch, held_out, **self.stability, config=settings)

    def check(
        self, rows_of: Callable[[Tensor], list[Tensor]], values: TokenValues, where: str
    ) -> None:
        expected = {
            term: torch.cat([row[term] for row in self.expected])
            for term in ("direct_target", "direct_proxy")
        }
        expected["composite"] = expected["direct_target"] + 1.5 * expected["direct_proxy"]
        for term, value in expected.items():
            error = relative_error(torch.cat(rows_of(getattr(values, term))), value)
            assert error <= 1e-4, f"{term}, {where}: off by {error:.1e}"


@pytest.mark.parametrize(
    ("depth", "chosen"), [(2, "linears"), (2, "norms"), (2, "all"), (None, "all")]
)
@pytest.mark.parametrize("name", by_architecture())
def test_every_architecture_matches_per_token_gradients(
    name: str, depth: int | None, chosen: str
) -> None:
    setting = Setting(name, depth, chosen)
    every_way = (depth, chosen) == (None, "all")
    kernels = ["sdpa", "eager"] if every_way and not setting.case.eager_only else ["eager"]
    for attention in kernels:
        setting.model.set_attn_implementation(attention)
        for side in ("right", "left") if every_way else ("right",):
            values = setting.score(
                collate(setting.sequences, side), collate(setting.validation, side)
            )
            setting.check(partial(unpad, sequences=setting.sequences, side=side), values, side)
        if setting.case.packable:
            values = setting.score(
                pack(setting.sequences, 2),
                pack(setting.validation, 1),
                residency="resident",
                chunk_tokens=1,
            )
            setting.check(partial(unpack, sequences=setting.sequences, rows=2), values, "packed")


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stages"), [(1, (3,)), (2, (1, 2, 3))])
def test_preconditioned_values_match_per_token_gradients(
    world_size: int, stages: tuple[int, ...], run_values: dict[str, Any], tmp_path: Path
) -> None:
    """After two optimizer steps: directions are multiplied by what Adam multiplies gradients by, at
    any ZeRO stage."""
    settings = {
        "estimator": "exact",
        "parameters": "all",
        "layers": "all",
        "preconditioner": "adam",
        "window": 32,
    }
    values = changed(
        run_values, valuation={**settings, "stability_weight": 0.0}, train={"max_steps": 3}
    )
    configs = {
        f"stage {stage}": changed(
            values,
            train={"output_dir": str(tmp_path / f"{stage}")},
            deepspeed={"config": {"zero_optimization": {"stage": stage}}},
        )
        for stage in stages
    }
    results = run_ranks("scored_after", world_size, tmp_path / "ranks", configs=configs, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(run_values["model"]["name_or_path"])
    train, held_out = (
        tokenised(tokenizer, run_values["data"][part]) for part in ("train", "validation")
    )
    rows = Order([len(train)], None, (0, 0)).step(2, 12)
    validation = Order([len(held_out)], None, (0, 1)).step(2, 5)
    for name in configs:
        model = AutoModelForCausalLM.from_pretrained(run_values["model"]["name_or_path"])
        model.load_state_dict(results[0][name]["weights"], strict=False)
        moments = results[0][name]["moments"]
        scale = {key: (v > 0) / ((v / (1 - 0.999**2)).sqrt() + 1e-8) for key, v in moments.items()}
        expected = exact_values(
            model,
            [train[row] for row in rows],
            [held_out[row] for row in validation],
            list(scale),
            scale=scale,
        )
        actual = {row: value for result in results for row, value in result[name]["rows"].items()}
        assert actual.keys() == set(rows.tolist())
        error = relative_error(
            torch.cat([actual[int(row)] for row in rows]),
            torch.cat([each["direct_target"] for each in expected]),
        )
        assert error <= 1e-4, f"{name}: off by {error:.1e}"


def test_what_exact_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(random_sequences(LENGTHS, seed=1))
    with pytest.raises(
        UserError, match="preconditioner=adam needs the optimizer of a training run"
    ):
        score_tokens(
            CASES["llama"].build(),
            batch,
            batch,
            config=ValuationConfig(estimator="exact", preconditioner="adam"),
        )
    adapted = with_adapters(CASES["llama"], CASES["llama"].build(), wrapped=False)
    with pytest.raises(UserError, match="LoRA trains no norms"):
        score_tokens(
            adapted,
            batch,
            batch,
            config=ValuationConfig(estimator="exact", parameters="norms", layers=2),
        )
    model = CASES["mixtral"].build()
    monkeypatch.setattr(type(model), "set_experts_implementation", lambda *_: None)
    with pytest.raises(
        UserError, match=r"MixtralForCausalLM here: a MixtralDecoderLayer has no .* \(.*_grouped_mm"
    ):
        score_tokens(model, batch, batch, config=ValuationConfig(estimator="exact", layers=2))


@pytest.mark.parametrize("chosen", ["linears", "all"])
def test_adapters_are_what_is_scored_with_lora(chosen: str) -> None:
    model = with_adapters(CASES["llama"], CASES["llama"].build(), wrapped=False)
    sequences, validation = (
        random_sequences(LENGTHS, seed=1),
        random_sequences(VALIDATION_LENGTHS, seed=2),
    )
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    expected = exact_values(model, sequences, validation, names)
    config = ValuationConfig.model_validate(
        {"estimator": "exact", "layers": "all", "parameters": chosen}
    )
    values = score_tokens(model, collate(sequences), collate(validation), config=config)
    actual = torch.cat(unpad(values.composite, sequences))
    assert relative_error(actual, torch.cat([row["direct_target"] for row in expected])) <= 1e-4


def test_adam_scales_nothing_where_it_has_seen_no_gradient() -> None:
    moment = torch.tensor([0.0, 1e-4, 4.0])
    scale = adam_scale(moment, steps=3, beta2=0.9, eps=1e-2)
    expected = [0.0, *(1 / ((v / (1 - 0.9**3)) ** 0.5 + 1e-2) for v in (1e-4, 4.0))]
    torch.testing.assert_close(scale, torch.tensor(expected))
