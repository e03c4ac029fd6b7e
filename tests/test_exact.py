"""Estimator `exact` against explicit per-token gradients in float64, and its identity with the ghost contraction."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken import TokenValues, ValuationConfig, score_tokens
from tests.exact_oracle import exact_values
from tests.oracle import relative_error
from tests.test_valuation import LENGTHS, VALIDATION_LENGTHS, stability
from tests.tiny import CASES, TinyCase, collate, pack, random_sequences, scored_linears, unpack, unpad

PARAMETERS = ("linears", "norms", "all")


def parameter_names(case: TinyCase, model: PreTrainedModel, depth: int, chosen: str) -> list[str]:
    """Written apart from `alphatoken.architectures`: by the names that parameters have."""
    names = [name for name, _ in model.named_parameters() if "vision" not in name and "multi_modal" not in name]
    layers = model.config.get_text_config().num_hidden_layers
    own = [re.escape(f"{case.layer_prefix}.{layer}.") for layer in range(layers - depth, layers)]
    inside = [name for name in names if re.match("|".join(own), name)]
    outside = [name for name in names if not name.startswith(case.layer_prefix)]
    embeddings = [name for name in outside if re.search(r"embed|\.wte|\.wpe", name) and "embed_out" not in name]
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
        self.sequences, self.validation = random_sequences(LENGTHS, 1), random_sequences(VALIDATION_LENGTHS, 2)
        layers = self.model.config.get_text_config().num_hidden_layers
        names = parameter_names(self.case, self.model, depth or layers, chosen)
        self.config = {"estimator": "exact", "layers": depth or "all", "parameters": chosen}
        self.stability = dict(zip(("fisher", "reference"), stability(self.model, names), strict=True))
        self.expected = exact_values(self.model, self.sequences, self.validation, names, **self.stability)

    def score(self, batch: dict[str, Tensor], held_out: dict[str, Tensor], **config: Any) -> TokenValues:
        settings = ValuationConfig.model_validate({**self.config, **config})
        return score_tokens(self.model, batch, held_out, **self.stability, config=settings)

    def check(self, rows_of: Callable[[Tensor], list[Tensor]], values: TokenValues, where: str) -> None:
        for term in ("direct_target", "direct_proxy"):
            error = relative_error(torch.cat(rows_of(getattr(values, term))), self.concatenated(term))
            assert error <= 1e-4, f"{term}, {where}: off by {error:.1e}"

    def concatenated(self, term: str) -> Tensor:
        return torch.cat([row[term] for row in self.expected])


@pytest.mark.parametrize(("depth", "chosen"), [(2, "linears"), (2, "norms"), (2, "all"), (None, "all")])
@pytest.mark.parametrize("name", CASES)
def test_every_architecture_matches_per_token_gradients(name: str, depth: int | None, chosen: str) -> None:
    setting = Setting(name, depth, chosen)
    every_way = (depth, chosen) == (None, "all")
    kernels = ["sdpa", "eager"] if every_way and not setting.case.eager_only else ["eager"]
    for attention in kernels:
        setting.model.set_attn_implementation(attention)
        for side in ("right", "left") if every_way else ("right",):
            values = setting.score(collate(setting.sequences, side), collate(setting.validation, side))
            setting.check(partial(unpad, sequences=setting.sequences, side=side), values, side)
        if setting.case.packable:
            values = setting.score(
                pack(setting.sequences, 2), pack(setting.validation, 1), residency="resident", chunk_tokens=1
            )
            setting.check(partial(unpack, sequences=setting.sequences, rows=2), values, "packed")
