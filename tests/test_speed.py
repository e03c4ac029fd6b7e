"""Model FLOPs are those that plans count, and peaks are found by the names that drivers give."""

from __future__ import annotations

import pytest

from alphatoken.models.decoder import decoder_of
from alphatoken.planner.plan import GPUS
from alphatoken.training.speed import TERA, peak_flops, training_flops
from tests.test_plan import plan_of
from tests.tiny import CASES


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == (None if peak is None else peak * TERA)


def test_every_device_that_can_be_planned_for_has_a_peak() -> None:
    names = {gpu.partition("-")[0].upper().replace("RTX4090", "RTX 4090") for gpu in GPUS}
    assert all(peak_flops(name) for name in names)


def test_it_is_what_plans_count() -> None:
    """But for the logits, which training computes a second time where they take several blocks."""
    blueprint = plan_of("llama-3.1-8b").blueprint
    work = blueprint.workload
    flops = training_flops(blueprint.decoder)
    assert flops is not None
    tokens = work.rows * work.row_tokens
    own = flops.of(tokens, tokens * work.row_tokens)
    planned = blueprint.body.forward + blueprint.body.backward
    assert own == planned + 3 * tokens * blueprint.head_flops


def test_frozen_weights_have_no_gradient_and_experts_no_count() -> None:
    decoder = decoder_of(CASES["llama"].build())
    whole = training_flops(decoder)
    decoder.model.requires_grad_(requires_grad=False)
    frozen = training_flops(decoder)
    assert whole is not None
    assert frozen is not None
    assert frozen.per_token * 3 == whole.per_token * 2
    assert training_flops(decoder_of(CASES["mixtral"].build())) is None
