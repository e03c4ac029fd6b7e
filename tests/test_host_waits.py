"""How often the host would wait for a GPU while a micro-batch is scored, selected and trained on.

A wait lets the device run dry: it has nothing queued until the host has launched more.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alphatoken.batch import Batch, make_batch
from alphatoken.config.preference import PreferenceConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.select import Selection
from alphatoken.stability.drift import Drift
from alphatoken.training.statistics import StepStatistics
from alphatoken.training.valued_model import ValuedModel
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.estimator import Coefficients, Scorer
from alphatoken.values.registry import build_scorer
from tests.host_waits import HostWaits
from tests.test_rules_equivalence import micro_batch
from tests.test_valuation import stability
from tests.tiny import random_sequences, tiny_llama

CPU = torch.device("cpu")
ROWS = [(3, 9), (4, 2), (2, 5), (5, 8), (1, 1), (2, 6)]
CHUNK_TOKENS = 30
"""Two rows of these in each chunk; of packed ones one."""
MOST = {
    ("sft", "half"): 3,
    ("sft", "half of each row"): 6,
    ("dpo", "half"): 6,
    ("dpo", "half of each row"): 12,
}
"""One is of `transformers`, which looks at positions for packed documents."""
WAYS: dict[str, dict[str, Any]] = {
    "terms": {},
    "composite": {"split_terms": False},
    "streamed": {"residency": "streamed"},
    "ghost product": {"contraction": "ghost"},
    "halves": {"reliability": True},
    "contrast and halves": {"contrast": 1.0, "contrast_from": "scored", "reliability": True},
    "exact": {"estimator": "exact"},
    "exact, composite": {"estimator": "exact", "split_terms": False, "parameters": "all"},
}


def scorer_of(
    model: PreTrainedModel, config: ValuationConfig, batch: Batch, coefficients: Coefficients | None
) -> Scorer:
    """A scorer whose held-out rows, and rows of B, are those of a batch."""
    decoder = decoder_of(model)
    names = [linear.name for linear in decoder.scored_linears(2)]
    fisher, reference = stability(model, names)
    stable = {name: model.get_parameter(name) for name in names}
    scorer = build_scorer(decoder, config, CPU, Drift(stable, fisher, reference, CPU))
    scorer.refresh([batch], 100, [batch] if config.contrast else None, coefficients)
    return scorer


def batch_of(config: ValuationConfig, *, packed: bool) -> Batch:
    batch = micro_batch(random_sequences(ROWS, seed=1), packed=packed)
    columns = dict(batch)
    columns["reference_nll"] = torch.rand(batch["response"].shape) * batch["response"]
    columns["rows"] = torch.arange(len(ROWS) // 2).repeat_interleave(2)
    if config.reliability:
        columns["half_sign"] = 1.0 - 2 * (batch["document_ids"] % 2)
    return make_batch(columns)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_scoring_does_not_wait(way: str, packed: bool) -> None:
    """However many chunks there are."""
    settings = {"layers": 2, "chunk_tokens": CHUNK_TOKENS, **WAYS[way]}
    config = ValuationConfig.model_validate(settings)
    model, batch = tiny_llama(), batch_of(config, packed=packed)
    with torch.no_grad():
        scorer = scorer_of(model, config, batch, None)
        with scorer.capture() as capture:
            decoder_of(model).hidden_states(batch)
        with HostWaits() as waits:
            scorer.score(capture.entry, batch)
    assert waits.total == 0, waits.by_kind


SELECTIONS = {
    "half": Selection("top_value", Fraction(1, 2), protect_eos=True),
    "half of each row": Selection("top_value", Fraction(1, 2), scope="sequence", min_keep=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_micro_batch_waits_a_few_times(objective: str, selection: str, packed: bool) -> None:
    """Forward, scoring, selection, loss, backward and statistics. Which tokens are kept follows
    from values, so the host has to wait for these: once per branch to choose, and once for all."""
    config = ValuationConfig(layers=2, chunk_tokens=CHUNK_TOKENS)
    model, batch = tiny_llama(), batch_of(config, packed=packed)
    of_pairs = objective == "dpo"
    minimised = PreferenceObjective(PreferenceConfig()) if of_pairs else SupervisedObjective()
    selections = (SELECTIONS[selection],) * (2 if of_pairs else 1)
    valued = ValuedModel(
        decoder=decoder_of(model),
        objective=minimised,
        selections=selections,
        eos_token_ids=[2],
        stopwatch=Stopwatch(CPU),
    )
    valued.attach(scorer_of(model, config, batch, minimised.coefficients if of_pairs else None))
    statistics = StepStatistics(
        device=CPU,
        part_weights=(1.0, 1.0),
        has_drift=True,
        selections=selections,
        branches=minimised.branches,
    )
    with HostWaits() as waits:
        output = valued(batch)
        output["total"].backward()
        statistics.add(batch, output)
    assert 0 < waits.total <= MOST[objective, selection], waits.by_kind
