"""When a scorer is brought up to date, and from which steps a run can go on."""

from __future__ import annotations

from typing import Any, cast

import pytest

from alphatoken.values.estimator import Scorer
from alphatoken.values.refresh import HeldOutRefresh


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
