"""When a scorer is brought up to date, and from which steps a run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from alphatoken.values.estimator import Scorer
from alphatoken.values.refresh import HeldOutRefresh
from tests.ranks import run_ranks
from tests.runs import changed


class Recorder:
    """A scorer that remembers what it was refreshed with."""

    needs_contrast_rows = False

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def refresh(self, batches: Any, *_others: Any) -> list[Any]:
        self.drawn.append(batches)
        return batches or []


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 2), (4, 2), (6, 3), (5, 1)])
def test_nothing_is_drawn_before_the_first_valued_step(start: int, every: int) -> None:
    """A continued run draws what the uninterrupted one drew, wherever it says that it can go on."""

    def drawn(first: int) -> dict[int, Any]:
        """By step, what the scorer was given; None where it kept the signals it had."""
        scorer = Recorder()
        refresh = HeldOutRefresh(
            scorer=cast(Scorer, scorer),
            draw=lambda number: cast(Any, [number]),
            draw_contrast=lambda number: [],
            every=every,
            start=start,
            adam_scale=None,
            first_moment=None,
        )
        found = {}
        for step in range(first, 12):
            before = len(scorer.drawn)
            refresh.before(step, own_tokens=1)
            if len(scorer.drawn) > before:
                found[step] = scorer.drawn[-1]
        rebuilt.update(done for done in range(12) if refresh.can_be_rebuilt_after(done))
        return found

    rebuilt: set[int] = set()
    whole = drawn(0)
    assert list(whole) == list(range(start, 12))
    assert whole == {step: None if step % every else [step // every] for step in range(start, 12)}
    for done in range(12):
        # Signals that the next step keeps are lost with the process.
        assert (done in rebuilt) == (whole.get(done, []) is not None)
        assert drawn(done) == {step: given for step, given in whole.items() if step >= done}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_values_do_not_depend_on_how_held_out_rows_are_batched(
    estimator: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Six rows on two ranks, three of them on each."""
    expected = {None: [1, 1, 1], 1: [1, 1, 1], 10**5: [3]}
    settings = {"estimator": estimator, "layers": 2, "window": 32, "validation_sequences": 6}
    configs = {
        str(tokens): changed(
            run_values,
            valuation={**settings, "stability_weight": 0.0, "held_out_batch_tokens": tokens},
            train={
                "micro_batch_size": 1,
                "max_steps": 2,
                "output_dir": str(tmp_path / str(tokens)),
            },
        )
        for tokens in expected
    }
    for result in run_ranks("scored_after", 2, tmp_path / "ranks", configs=configs, steps=1):
        assert {name: found["held_out"] for name, found in result.items()} == {
            str(tokens): rows for tokens, rows in expected.items()
        }
        for found in result.values():
            assert found["rows"].keys() == result["None"]["rows"].keys()
            for row, value_T in result["None"]["rows"].items():
                scale = float(value_T.abs().max())
                torch.testing.assert_close(
                    found["rows"][row], value_T, rtol=1e-3, atol=1e-4 * scale
                )
