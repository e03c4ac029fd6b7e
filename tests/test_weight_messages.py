"""How many messages ZeRO-3 gathers weights by: passes besides training's keep its order of modules,
and change no digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import changed

STEPS = 3
TIMES = ("seconds_", "tokens_per_second", "mfu", "peak_memory_bytes")


def zero3(**settings: Any) -> dict[str, Any]:
    """Most weights of the tiny model are not small, as in a model of use."""
    shared = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 100}
    return {"config": {"zero_optimization": {**shared, **settings}}}


@pytest.fixture
def configs(run_values: dict[str, Any], pair_values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs of three steps with a refresh and an evaluation in each."""
    train = {"max_steps": STEPS, "eval_every": 1}
    unstable = {"stability_weight": 0.0}
    sft = changed(run_values, deepspeed=zero3(), train=train, valuation=unstable)
    pairs = changed(pair_values, deepspeed=zero3(), train=train, valuation=unstable)
    # As with a large model: little is kept until its next use, and little is fetched ahead.
    scarce = zero3(stage3_max_reuse_distance=20_000, stage3_prefetch_bucket_size=20_000)
    contrast = {"contrast": 1.0, "contrast_from": "drawn", "reliability": True}
    return {
        "ghost": changed(sft, train={"gradient_checkpointing": True}),
        "ghost, little kept": changed(sft, deepspeed=scarce),
        "one micro-batch": changed(sft, train={"global_batch_size": 4}, deepspeed=scarce),
        "ahead": changed(sft, selection={"scope": "global_batch", "weights": "eaft"}),
        "packed, contrast": changed(sft, data={"packing": True}, valuation=contrast),
        "lora": changed(sft, model={"lora": {"r": 3}}),
        "exact": changed(sft, valuation={"estimator": "exact", "window": 32, **contrast}),
        "every other": changed(sft, valuation={"refresh_every": 2, "residency": "streamed"}),
        "pairs": changed(pairs, valuation={"target": "preference"}, reference={"mode": "online"}),
        "pairs, cached": changed(pairs, valuation=contrast),
    }


@pytest.mark.slow
def test_passes_besides_training_keep_the_order_and_every_digit(
    configs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = {}
    for keeps in (True, False):
        folder = tmp_path / str(keeps)
        own = {
            name: changed(values, train={"output_dir": str(folder / name)})
            for name, values in configs.items()
        }
        found[keeps] = run_ranks("weight_messages", 2, folder, configs=own, keeps_order=keeps)[0]
    for name in configs:
        kept, lost = (found[keeps][name] for keeps in (True, False))
        assert [*map(without_times, kept["metrics"])] == [*map(without_times, lost["metrics"])]
        assert exported(tmp_path / "True" / name) == exported(tmp_path / "False" / name)
        assert not any(orders for _, orders in kept["messages"])
        # The two first are the evaluation before training, and the step that shows the order.
        for (now, _), (before, _) in zip(kept["messages"][2:], lost["messages"][2:], strict=True):
            assert now < before
    assert [messages for messages, _ in found[True]["ghost"]["messages"][2:]] == [6] * (STEPS - 1)


def exported(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "export").glob("*.safetensors"))]


def without_times(step: dict[str, Any]) -> dict[str, Any]:
    return {name: number for name, number in step.items() if not name.startswith(TIMES)}
