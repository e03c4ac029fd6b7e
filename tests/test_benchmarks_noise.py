"""How the benchmark of rules counts, against the definitions, and that it goes on where it
stopped."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken.config.sections import ModelConfig
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError
from benchmarks.noise import (
    Example,
    Measured,
    Ordered,
    Pool,
    estimators,
    main,
    markdown,
    measure,
    parse,
    read_pool,
)
from recipes.quickstart.get_model import save_tiny

RNG = np.random.default_rng(0)
ROW = RNG.integers(0, 5, 60)
BAD = RNG.random(60) < 0.3
VALUE = RNG.integers(0, 9, 60).astype(float)


def repeated(multiplicity: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
    """Tokens, each as often as its row is drawn."""
    return [token for token in range(60) for _ in range(int(multiplicity[ROW[token]]))]


@pytest.mark.parametrize("drawn", [[1, 1, 1, 1, 1], [0, 2, 1, 0, 2]])
def test_auroc_is_the_chance_that_a_bad_token_is_valued_lower(drawn: list[int]) -> None:
    tokens = repeated(np.array(drawn, dtype=float))
    pairs = list(
        itertools.product([t for t in tokens if BAD[t]], [t for t in tokens if not BAD[t]])
    )
    lower = [(VALUE[bad] < VALUE[good]) + (VALUE[bad] == VALUE[good]) / 2 for bad, good in pairs]
    auroc, _ = Ordered(VALUE, BAD, ROW).measures(np.array(drawn, dtype=float))
    assert auroc == pytest.approx(np.mean(lower))


@pytest.mark.parametrize("drawn", [[1, 1, 1, 1, 1], [0, 2, 1, 0, 2]])
def test_bad_among_kept_counts_the_best_half(drawn: list[int]) -> None:
    distinct = RNG.permutation(60).astype(float)
    tokens = repeated(np.array(drawn, dtype=float))
    best = sorted(tokens, key=lambda token: -distinct[token])
    whole = len(best) // 2
    bad = BAD[best[:whole]].sum() + (len(best) % 2) / 2 * BAD[best[whole]]
    _, kept = Ordered(distinct, BAD, ROW).measures(np.array(drawn, dtype=float))
    assert kept == pytest.approx(bad / (len(best) / 2))


def test_without_both_kinds_there_is_nothing_to_measure() -> None:
    assert np.isnan(Ordered(VALUE, np.zeros(60, bool), ROW).measures(np.ones(5))).all()


@pytest.mark.slow
def test_a_measurement_goes_on_and_makes_its_table(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    output = tmp_path / "noise.json"
    small = (
        "measure --scored 4 --contrast 4 --held-out 4 --bootstrap 9 --max-length 1024 "
        "--reference-steps 1 "
        f"--model {tmp_path / 'tiny'} --output {output} --cases"
    ).split()
    ghost = ["--estimators", "ghost, last 3", "drop_harmful.yaml"]
    main([*small, "rule, problems", *ghost, "--stages", "0"])
    first = json.loads(output.read_text())
    ghost += ["--stages", "0", "1"]
    main([*small, "rule, problems", "junk, problems", *ghost])
    both = json.loads(output.read_text())
    rule = both["cases"]["rule, problems"]["stages"]
    assert rule["0"] == first["cases"]["rule, problems"]["stages"]["0"]
    assert list(rule) == ["0", "1"]
    stages = both["cases"]["junk, problems"]["stages"]
    assert list(stages) == ["0", "1"]
    for measures in stages.values():
        assert "drop_harmful.yaml" in measures
        for made in ("kinder half", "response mean"):
            assert f"ghost, last 3: G - B, {made}" in measures
        for value, low, high in (each[name] for each in measures.values() for name in each):
            assert 0 <= low <= high <= 1
            assert 0 <= value <= 1
    table = markdown(both)
    assert table.count("| lowest loss") == 2
    with pytest.raises(UserError, match="other settings"):
        measure(parse([*small, "rule, problems", *ghost, "--lr", "1"]))


def rows_in(folder: Path) -> tuple[Pool, int]:
    """A few rows, tokenised for the random model that is put there, and its padding token."""
    if not (folder / "tiny").exists():
        save_tiny(folder / "tiny")
    sizes = "--scored 4 --contrast 4 --held-out 4 --max-length 1024"
    options = parse(["measure", *sizes.split(), "--model", str(folder / "tiny"), "--output", "-"])
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "tiny")))
    return read_pool("junk, problems", tokenizer, options), tokenizer.pad_token_id


def measured_in(folder: Path, reference_steps: int = 1) -> Measured:
    """A random model and a few rows, all four held-out ones in a step."""
    pool, pad_token = rows_in(folder)
    return Measured(
        AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32).eval(),
        pool,
        pad_token,
        micro_batch=2,
        lr=1e-4,
        reference_steps=reference_steps,
        rows_per_step=4,
    )


def losses_by_hand(model: PreTrainedModel, rows: Sequence[Example]) -> torch.Tensor:
    """Of the response tokens of all rows, each read by itself."""
    losses = []
    for row in rows:
        ids = torch.tensor(row.document.input_ids)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses.append(each[torch.tensor(row.document.response_mask[1:])])
    return torch.cat(losses)


@pytest.mark.slow
def test_the_second_model_has_learned_the_held_out_rows_alone(tmp_path: Path) -> None:
    none, one = (measured_in(tmp_path, steps).seen() for steps in (0, 1))
    assert torch.equal(none.held_out_nll_R, none.start_nll_R)
    assert torch.equal(one.nll_R, none.nll_R), "the model itself is not trained"
    pool, _ = rows_in(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    losses_by_hand(model, pool.held_out).mean().backward()
    optimizer.step()
    torch.testing.assert_close(one.held_out_nll_R, losses_by_hand(model, pool.scored).detach())
    assert not torch.allclose(one.held_out_nll_R, one.start_nll_R)


@pytest.mark.slow
def test_the_mean_of_a_response_is_that_in_the_kinder_half(tmp_path: Path) -> None:
    measured = measured_in(tmp_path)
    settings = estimators(4)["ghost, last 3"]
    made = {name: each.tolist() for name, each in measured.values(settings).items()}
    value, kinder, mean = (
        made[f"G - B{name}"] for name in ("", ", kinder half", ", response mean")
    )
    _, row_R = measured.tokens()
    for row in range(4):
        own = [token for token, its in enumerate(row_R) if its == row]
        values = sum(value[token] for token in own) / len(own)
        bound = sum(kinder[token] for token in own) / len(own)
        assert len({mean[token] for token in own}) == 1
        assert values < mean[own[0]] < bound  # |mean| is below the mean of absolute spreads


@pytest.mark.slow
def test_the_preset_drops_first_what_it_vetoes_and_keeps_that_out_of_b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model gives most tokens a probability of about 1 / 256."""
    measured = measured_in(tmp_path)
    settings = estimators(4)["drop_harmful.yaml"]
    probability_R = (-measured.seen().nll_R).exp()
    none_R = measured.preset_order(settings)  # the preset's own veto is far below any of these
    assert none_R.isfinite().all()

    monkeypatch.setattr("benchmarks.noise.preset_veto", lambda: 0.0041)
    some_R = measured.preset_order(settings)
    vetoed_R = probability_R < 0.0041
    assert 0 < vetoed_R.sum() < len(vetoed_R)
    assert torch.equal(some_R == -math.inf, vetoed_R)
    assert not torch.equal(some_R[~vetoed_R], none_R[~vetoed_R])  # another B
