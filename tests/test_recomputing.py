"""Layers that run again in the backward pass, with the states that enter them on the host."""

from __future__ import annotations

import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken.config.valuation import ValuationConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.models.recomputing import recompute_layers
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.select import Selection
from alphatoken.training.valued_model import ValuedModel
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.registry import build_scorer
from tests.host_copies import host_copies
from tests.ranks import run_ranks
from tests.runs import changed
from tests.test_distributed import exact
from tests.test_rules_equivalence import micro_batch
from tests.tiny import CASES, by_architecture, collate, random_sequences, tiny_llama


def trained(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[Tensor], list[bool]]:
    """The gradients of a loss; the states that entered layers; and which of those were still in
    memory between the passes."""
    decoder = decoder_of(model.train())
    decoder.freeze_unreached()
    states: list[Tensor] = []
    storages: list[weakref.ref[Any]] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        states.append(state.detach().clone())
        storages.append(weakref.ref(state.untyped_storage()))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    batch = collate(random_sequences([(3, 5), (2, 4)], seed=1))
    loss = decoder.hidden_states(batch).square().sum()
    alive = [storage() is not None for storage in storages]
    for hook in hooks:
        hook.remove()
    loss.backward()
    gradients = {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }
    return gradients, states, alive


@pytest.mark.parametrize("case", by_architecture())
def test_what_enters_layers_leaves_the_device_and_nothing_else(case: str) -> None:
    """Neither weights nor masks; in the order of the layers, each once, and gradients are those of
    plain recomputation."""
    models = {offload: CASES[case].build() for offload in (False, True)}
    for offload, model in models.items():
        recompute_layers(model, offload=offload)
    with host_copies() as none:
        expected, states, alive = trained(models[False])
    assert all(alive)
    assert not none.out
    with host_copies() as copies:
        gradients, _, alive = trained(models[True])
    assert not any(alive), "the device still has what was copied"
    assert len(copies.out) == copies.back == len(states)
    assert all(map(torch.equal, copies.out, states))
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in gradients.items())


@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_states_that_scoring_needs_are_gone_when_the_loss_is_computed(estimator: str) -> None:
    """The head's logits come next, the largest tensors of all."""
    config = ValuationConfig.model_validate({"layers": 2, "estimator": estimator})
    model = tiny_llama()
    batch = micro_batch(random_sequences([(3, 5), (2, 4)], seed=1), packed=False)
    decoder = decoder_of(model)
    valued = ValuedModel(
        decoder=decoder,
        objective=SupervisedObjective(),
        selections=[Selection("top_value", Fraction(1, 2))],
        eos_token_ids=[],
        stopwatch=Stopwatch(torch.device("cpu")),
    )
    valued.attach(build_scorer(decoder, config, torch.device("cpu"), None))
    assert valued.scorer is not None
    valued.scorer.refresh([batch], 9)
    recompute_layers(model, offload=True)
    states: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args: states.append(weakref.ref(args[0].untyped_storage()))
        )
    valued.head_loss.register_forward_pre_hook(
        lambda *_: alive.extend(state() is not None for state in states)
    )
    with host_copies():
        valued.train()(batch)
    assert alive == 4 * [False]


@pytest.mark.slow
def test_runs_are_the_same_bit_for_bit(
    run_values: dict[str, Any],
    pair_data: dict[str, str],
    stability: dict[str, str],
    tmp_path: Path,
) -> None:
    """On two ranks, under ZeRO-3 and stage 2: losses, values, gradients of every step and weights
    after them; also of a run that goes on."""
    unstable = {"stability_weight": 0.0}
    sections: dict[str, dict[str, Any]] = {
        "ghost": {"valuation": stability, "train": {"save_every": 1}},
        "resumed": {"valuation": stability},
        "exact, stage 2": {
            "valuation": {**exact("all", 2), **unstable},
            "deepspeed": {"config": {"zero_optimization": {"stage": 2}}},
        },
        "pairs, adapters": {
            "model": {"lora": {"r": 2}},
            "data": pair_data,
            "preference": {},
            "valuation": {**unstable, "target": "preference"},
        },
        "rows divided, packed": {
            "valuation": unstable,
            "data": {"packing": True},
            "train": {"sequence_parallel": 2},
        },
    }

    def configs(keeps: Any, folder: Path) -> dict[str, dict[str, Any]]:
        found = {}
        for name, changes in sections.items():
            train = {
                "output_dir": str(folder / name),
                "gradient_checkpointing": keeps,
                "global_batch_size": 4,
                "max_steps": 2 if name in ("ghost", "resumed") else 1,
            }
            found[name] = changed(changed(run_values, **changes), train=train)
        resume = str(folder / "ghost" / "checkpoints" / "step-1")
        found["resumed"]["train"]["resume"] = resume
        return found

    recomputed, offloaded = (
        run_ranks("runs_with_host_copies", 2, tmp_path, configs=configs(keeps, tmp_path / name))
        for keeps, name in ((True, "true"), ("offload", "offload"))
    )
    for on_device, on_host in zip(recomputed, offloaded, strict=True):
        for name in sections:
            expected, found = on_device[name], on_host[name]
            assert expected["copies"] == 0
            # Of every micro-batch the four layers' inputs, and nothing of held-out rows.
            assert found["copies"] == found["back"] == 4 * found["micro_batches"] > 0, name
            assert found["sizes"] == {3}, "not a state of rows, positions and features"
            check_equal(expected, found, name)
    for on_host in offloaded:
        whole, resumed = on_host["ghost"], on_host["resumed"]
        assert all(map(torch.equal, whole["weights"].values(), resumed["weights"].values()))


TIMES = ("seconds", "per_second", "mfu", "peak_memory")


def check_equal(expected: dict[str, Any], found: dict[str, Any], name: str) -> None:
    for step, gradients in enumerate(expected["gradients"]):
        for key, gradient in gradients.items():
            assert torch.equal(found["gradients"][step][key], gradient), (name, step, key)
    for key, weight in expected["weights"].items():
        assert torch.equal(found["weights"][key], weight), (name, key)
    for one, other in zip(expected["metrics"], found["metrics"], strict=True):
        for key in one.keys() | other.keys():
            if not any(word in key for word in TIMES):
                assert one[key] == other[key], (name, key)
