"""The next step's micro-batches are laid out while this one's are trained on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import micro_batches
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training import feed as feed_module
from alphatoken.training.feed import Feed
from alphatoken.training.setup import build_run
from alphatoken.util.ahead import Ahead

PATIENCE = 20.0
"""Seconds."""


def test_the_next_item_is_made_in_a_thread_while_this_one_is_used() -> None:
    made: dict[int, int] = {}
    events = {number: threading.Event() for number in range(9)}

    def make(number: int) -> int:
        made[number] = threading.get_ident()
        events[number].set()
        return number * number

    items = Ahead(make)
    assert items.take(3) == 9
    assert made[3] == threading.get_ident()
    assert events[4].wait(PATIENCE)
    assert made[4] != threading.get_ident()
    assert items.take(4) == 16
    assert items.take(0) == 0  # an order of its own
    assert events[1].wait(PATIENCE)
    assert made[0] == threading.get_ident()


def test_what_it_raises_reaches_who_takes_the_item() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("the disk is gone")
        return number

    items = Ahead(make)
    assert items.take(1) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        items.take(2)
    assert items.take(3) == 3


def test_a_feed_lays_out_the_next_step(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_values["valuation"]["enabled"] = False
    run = build_run(RunConfig.model_validate(run_values), SupervisedObjective())
    threads = []
    laid_out = threading.Event()

    def watched(*args: Any) -> list[Batch]:
        threads.append(threading.get_ident())
        if len(threads) == 2:
            laid_out.set()
        return micro_batches(*args)

    monkeypatch.setattr(feed_module, "micro_batches", watched)
    feed = Feed(run)
    first = feed.training(0)
    assert laid_out.wait(PATIENCE), "nothing was laid out ahead"
    assert threads[0] == threading.get_ident() != threads[1]
    for ahead, alone in ((feed.training(1), Feed(run).training(1)), (first, Feed(run).training(0))):
        assert len(ahead.batches) == len(alone.batches)
        for one, other in zip(ahead.batches, alone.batches, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["labels"], other["labels"])
