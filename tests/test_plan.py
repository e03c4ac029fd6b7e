"""`alphatoken plan`: against what runs take, and on every configuration that the project ships."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from alphatoken.batch import make_batch
from alphatoken.cli import app
from alphatoken.config.estimators import ESTIMATORS
from alphatoken.config.file import load_config
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import decoder_of
from alphatoken.models.loading import experts_note
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.planner.counting import FORMULAS, PeakBytes
from alphatoken.planner.plan import GIB, Plan, make_plan
from alphatoken.planner.workload import Rows, longest_rows
from alphatoken.values.exact.gradient import MeanGradient
from alphatoken.values.registry import build_scorer
from benchmarks.plan_accuracy import CASES, DIVIDED, of_ranks
from benchmarks.preference_memory import save_data
from tests.ranks import ROOT, run_ranks
from tests.tiny import CASES as TINY
from tests.tiny import SMALL, by_architecture, collate, random_sequences

CPU = torch.device("cpu")
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
MODELS = {
    "llama3.2_3b": "llama-3.2-3b",
    "llama3.1_8b": "llama-3.1-8b",
    "llama3.3_70b": "llama-3.3-70b",
    "gemma3_4b": "gemma-3-4b",
    "qwen3.5_9b": "qwen3.5-9b",
}
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
PLANNED = [file for file in CONFIGS if file.name.startswith(tuple(MODELS))]


def load(file: Path, *overrides: str) -> RunConfig:
    return load_config(RunConfig, file, overrides, {"preference": PreferenceRunConfig})


def model_folder(file: Path) -> Path:
    """Where the `config.json` of the model of a shipped configuration is."""
    return (
        ROOT
        / "tests"
        / "models"
        / next(name for start, name in MODELS.items() if file.name.startswith(start))
    )


def measured(
    cases: Iterable[str], ranks: int, model: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """What one step of each case communicated and computed on so many ranks, and what was
    planned."""
    save_data(folder, 16, 24)
    found: list[Any] = run_ranks(
        "planned_and_measured", ranks, folder, model=model, cases=list(cases)
    )
    return {case: of_ranks([each[case] for each in found]) for case in found[0]}


def check_accuracy(found: dict[str, Any]) -> None:
    """DeepSpeed's communications log of one step within 5 %, torch's FLOP counter with math
    attention within 10 %."""
    assert found["bytes"]["planned"] == pytest.approx(found["bytes"]["measured"], rel=0.05)
    assert found["flops"]["planned"] == pytest.approx(found["flops"]["measured"], rel=0.10)


@pytest.fixture(scope="module")
def accuracy(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Of every case on two ranks."""
    return measured(CASES, 2, tiny_model, tmp_path_factory.mktemp("accuracy"))


@pytest.fixture(scope="module")
def divided_accuracy(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Of rows that are divided, on two groups of two ranks."""
    return measured(DIVIDED, 4, tiny_model, tmp_path_factory.mktemp("divided"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bytes_and_flops_are_as_planned(accuracy: dict[str, dict[str, Any]], case: str) -> None:
    check_accuracy(accuracy[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", DIVIDED)
def test_bytes_and_flops_of_divided_rows_are_as_planned(
    accuracy: dict[str, dict[str, Any]],
    divided_accuracy: dict[str, dict[str, Any]],
    case: str,
) -> None:
    """Each operation by itself, too: gathers, reductions and exchanges. Of a few numbers, which are
    not planned, are counts of tokens, sums and norms."""
    for found in (accuracy[case], divided_accuracy[case]):
        check_accuracy(found)
        for operation, sums in found["operations"].items():
            expected = pytest.approx(sums["measured"], rel=0.05, abs=4000)
            assert sums["planned"] == expected, operation


@pytest.mark.slow
def test_peak_memory_is_as_planned(tiny_model: Path, tmp_path: Path) -> None:
    """A launched run, above what is resident after its imports, within 15 %."""
    output = tmp_path / "accuracy.json"
    options = {"--model": tiny_model, "--dtype": "float32", "--cases": "ghost", "--output": output}
    command = [
        sys.executable,
        "-m",
        "benchmarks.plan_accuracy",
        *(str(each) for pair in options.items() for each in pair),
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    memory = json.loads(output.read_text())["cases"]["ghost"]["memory"]
    assert memory["planned"] == pytest.approx(memory["measured"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.stem)
def test_large_models_fit_where_their_configurations_say(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command in the file's first lines, from the model's `config.json` alone."""
    monkeypatch.chdir(ROOT)  # paths in configurations are relative to the project
    (command,) = re.findall(r"# +(?:DATA_DIR=DIR )?(alphatoken plan .*)", file.read_text())
    _, _, *options = shlex.split(command)
    arguments = dict(zip(options[::2], options[1::2], strict=True))
    assert arguments["--config"] == str(file.relative_to(ROOT))
    config = load(file, f"model.name_or_path={model_folder(file)}")
    plan = make_plan(config, longest_rows(config), int(arguments["--world"]), arguments["--gpu"])
    assert plan.fits


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.3-70b", 70_553_706_496),
    ],
)
def test_parameters_are_those_of_the_published_models(name: str, parameters: int) -> None:
    plan = plan_of(name)
    assert sum(numel for numel, _ in plan.blueprint.numels) == parameters
    # Adam's moments and masters, gradients and weights in bf16: 16 bytes a parameter, divided
    # over the ranks.
    states = ("weights", "fp32 master weights", "Adam's moments", "gradients")
    assert (
        sum(part.bytes for part in plan.memory.steady if part.name in states) == 16 * parameters / 8
    )


def test_deepspeed_configurations_put_states_where_they_say() -> None:
    shipped = {
        file.stem: plan_of("llama-3.2-3b", deepspeed={"config": str(file)}) for file in DEEPSPEED
    }
    steady = {
        name: {part.name: part.bytes for part in plan.memory.steady}
        for name, plan in shipped.items()
    }
    count = 3_212_749_824
    assert steady["zero3"]["weights"] == 2 * count / 8
    assert steady["zero2"]["weights"] == 2 * count
    assert steady["zero3_hpz"]["second copy of the weights, divided within a node"] == 2 * count / 8
    assert "Adam's moments" not in steady["zero3_offload"]
    assert shipped["zero3_offload"].memory.host == (2 + 4 + 4 + 8) * count / 8
    assert steady["zero3"]["Adam's moments"] == 8 * count / 8


def plan_of(name: str, ranks: int = 8, device: str | None = None, **sections: Any) -> Plan:
    values = {
        "model": {"name_or_path": str(ROOT / "tests" / "models" / name)},
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
        "train": {"output_dir": "run", "global_batch_size": 64, "micro_batch_size": 4},
        **sections,
    }
    return make_plan(RunConfig.model_validate(values), Rows(2048), ranks, device)


@pytest.mark.parametrize("case", by_architecture())
def test_every_supported_architecture_can_be_planned(case: str, tmp_path: Path) -> None:
    model = TINY[case].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    attention = "eager" if TINY[case].eager_only else "sdpa"
    values = {"name_or_path": str(tmp_path), "attn_implementation": attention}
    plan = plan_of(case, model=values, valuation={"layers": 2})
    assert sum(numel for numel, _ in plan.blueprint.numels) == sum(
        each.numel() for each in model.parameters()
    )
    assert all(0 < each.plain < each.total for each in plan.compute.values())


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_are_work(case: str, tmp_path: Path) -> None:
    """Every token is multiplied by the three matrices of the experts it is sent to, forward once
    and backward twice."""
    model = TINY[case].build()
    config = model.config
    config.architectures = [type(model).__name__]
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)

    def of_layer(experts_of_token: int) -> tuple[int, int]:
        config.num_experts_per_tok = experts_of_token
        config.save_pretrained(tmp_path)
        layer, *_ = plan_of(case, model={"name_or_path": str(tmp_path)}).blueprint.body.layers
        return layer.forward, layer.backward

    (forward, backward), (forward_of_two, backward_of_two) = of_layer(1), of_layer(2)
    tokens, expert = 4 * 2048, 3 * config.hidden_size * width
    assert forward_of_two - forward == 2 * tokens * expert
    assert backward_of_two - backward == 2 * (forward_of_two - forward)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "llama"])
def test_what_experts_cost_is_said(case: str) -> None:
    """All experts of a layer lie in the weights of one module: each rank gathers the same ones."""
    model = TINY[case].build()
    note = experts_note(model)
    if case == "llama":
        assert note is None
        return
    (shapes,) = {
        tuple(tuple(each.shape) for each in layer.mlp.experts.parameters())
        for layer in model.model.layers
    }
    elements = len(model.model.layers) * sum(math.prod(shape) for shape in shapes)
    share = elements / sum(each.numel() for each in model.parameters())
    assert note is not None
    assert note.startswith(f"3 experts in a layer, {share:.0%} of the weights, are trained and not")


@pytest.mark.parametrize("case", by_architecture())
def test_every_matrix_product_has_a_formula(case: str) -> None:
    """What multiplies matrices by its name is counted, in a pass forward and back."""
    model = TINY[case].build()
    seen: set[Any] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.add(func._overloadpacket)
            return func(*args, **(kwargs or {}))

    with Names():  # type: ignore[no-untyped-call]
        model(torch.arange(12)[None] % 7 + 3).logits.sum().backward()
    products = {each for each in seen if re.search(r"mm|matmul|conv(?!ert)|attention", str(each))}
    assert products
    assert products <= FORMULAS.keys()


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("valued", [False, True])
def test_entropy_costs_the_head_once_more(scope: str, *, valued: bool, tmp_path: Path) -> None:
    model = TINY["llama"].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)

    def total(weights: str) -> tuple[float, float]:
        plan = plan_of(
            "llama",
            model={"name_or_path": str(tmp_path)},
            valuation={"layers": 2, "enabled": valued},
            selection={"policy": "all", "weights": weights, "scope": scope},
        )
        work = plan.blueprint.workload
        return plan.own.total, work.micro_batches * work.responses * plan.blueprint.head_flops

    (plain, head), (entropy, _) = total("hard"), total("eaft")
    assert entropy - plain == head > 0


@pytest.mark.slow
def test_what_does_not_fit_is_told_how_to_fit() -> None:
    plan = plan_of("llama-3.1-8b", device="a100-40g")
    assert plan.fits is False
    sizes = [plan.needed, *(each.bytes for each in plan.advice)]
    assert sizes == sorted(sizes, reverse=True)
    assert plan.advice[0].change == "train.gradient_checkpointing=true"
    assert plan.capacity is not None
    assert sizes[-1] <= plan.capacity
    train = {"output_dir": "run", "global_batch_size": 64, "gradient_checkpointing": True}
    plan = make_plan(
        plan.blueprint.config.model_validate(
            {**plan.blueprint.config.model_dump(), "train": train}, strict=False
        ),
        Rows(65_536),
        8,
        "a100-40g",
    )
    changes = [each.change for each in plan.advice]
    assert "train.gradient_checkpointing=true" not in changes, "it is on"
    assert "train.gradient_checkpointing=offload" in changes


@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_states_on_the_host_leave_the_device(estimator: str, tmp_path: Path) -> None:
    """Of training; scoring holds on to those that it needs. Work and messages stay, and a CPU has
    one memory."""
    model = TINY["llama"].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)

    def planned(device: str, *, keeps: bool | str) -> Plan:
        return plan_of(
            "llama",
            device=device,
            model={"name_or_path": str(tmp_path)},
            valuation={"layers": 2, "estimator": estimator},
            train={
                "output_dir": "run",
                "global_batch_size": 64,
                "micro_batch_size": 4,
                "gradient_checkpointing": keeps,
            },
        )

    kept, moved = (planned("a100-40g", keeps=each) for each in (True, "offload"))
    state = 4 * 2048 * 24 * 2  # rows, positions, features, bf16
    less = {
        moment: sum(part.bytes for part in parts)
        - sum(part.bytes for part in moved.memory.moments[moment])
        for moment, parts in kept.memory.moments.items()
    }
    assert less["loss"] == less["backward"] == 4 * state
    # The two that entered the scored layers; forward mode needs the first of them only.
    assert less["score"] == (2 if estimator == "ghost" else 3) * state
    assert less["refresh"] == less["optimizer"] == 0
    assert moved.memory.host - kept.memory.host == 4 * 2**19 > 4 * state, "rounded up to be pinned"
    assert moved.offloaded == 2 * 4 * state, "micro-batches of four layers"
    assert kept.offloaded == 0
    assert moved.traffic == kept.traffic
    assert moved.own == kept.own
    on_cpu = [planned("cpu", keeps=each) for each in (True, "offload")]
    assert on_cpu[0].memory == on_cpu[1].memory
    assert on_cpu[1].offloaded == 0


@pytest.mark.slow
def test_what_is_too_close_to_tell_is_not_said_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`exact` over all parameters of 70 billion on four nodes."""
    monkeypatch.setenv("DATA_DIR", "data")
    monkeypatch.chdir(ROOT)
    settings = {"estimator": "exact", "layers": "all", "parameters": "all"}
    overrides = [f"valuation.{key}={value}" for key, value in settings.items()]
    command = ["plan", "--config", "configs/sft/llama3.3_70b_4x8gpu.yaml", "--world", "32"]
    command += ["--gpu", "h100-80g", "model.name_or_path=tests/models/llama-3.3-70b"]
    command += ["selection.keep_ratio=0.5"]
    result = CliRunner().invoke(app, [*command, *overrides])
    assert "It may not fit: " in result.output
    values = json.loads(CliRunner().invoke(app, [*command, *overrides, "--json"]).output)
    assert values["memory"]["fits"] is False
    assert values["memory"]["needed"] < values["memory"]["capacity"]


ONE_DIRECTION: dict[str, Any] = {"split_terms": False}
TWO_DIRECTIONS: dict[str, Any] = {"contrast": 1.0, "contrast_from": "drawn"}
"""Of G and B."""


@pytest.mark.parametrize(
    ("moment", "sizes", "lengths", "directions"),
    [
        ("refresh", {"vocab_size": 20_000}, [(3, 1), (2, 2)], ONE_DIRECTION),
        ("score", {"intermediate_size": 16}, [(3, 509), (2, 510)], ONE_DIRECTION),
        ("score", {"intermediate_size": 16}, [(3, 509), (2, 510)], TWO_DIRECTIONS),
    ],
    ids=["large embeddings", "long rows", "long rows in two directions"],
)
def test_exact_takes_what_is_planned(
    moment: str,
    sizes: dict[str, int],
    lengths: list[tuple[int, int]],
    directions: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Tensors that a refresh and scoring make, where what is planned is nearly all embeddings, and
    nearly all attention; within 15 %."""
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes}))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    everything = {"estimator": "exact", "layers": "all", "parameters": "all", **directions}
    values = {"stability_weight": 0.0, "validation_sequences": 2, **everything}
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": str(tmp_path), "dtype": "float32"},
            "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
            "train": {"output_dir": "run", "global_batch_size": 2, "micro_batch_size": 2},
            "valuation": values,
            "selection": {"keep_ratio": 0.5},
        }
    )
    responses = sum(response for _, response in lengths)
    rows = Rows(sum(lengths[0]), responses / sum(map(sum, lengths)))
    planned = make_plan(config, rows, 1).memory
    decoder = decoder_of(model)
    scorer = build_scorer(decoder, config.valuation, CPU, None)
    batch = make_batch(collate(random_sequences(lengths, seed=1)))
    given = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
    scorer.refresh([batch], contrast=[batch] if config.valuation.contrast else None)
    streamer = LayerStreamer(decoder, 0, CPU, resident=True)
    scored = decoder.scored_parameters(len(decoder.layers), "all")
    gradient = MeanGradient(decoder, scored, streamer, CPU)
    streamer.refresh()
    with PeakBytes(given) as refresh:
        gradient.refresh([batch], decoder.hidden_states)
    with torch.no_grad(), scorer.capture() as capture:
        decoder.hidden_states(batch)
    with PeakBytes([*given, *tree_leaves(capture.entry)]) as score:
        scorer.score(capture.entry, batch)
    left_out = ("gathered weights", "activations", "slices of the directions", "slices of G")
    parts = [part for part in planned.moments[moment] if part.name not in left_out]
    expected = sum(part.bytes for part in parts)
    if moment == "refresh":  # of a single process, the gradients of a segment are its slice of G
        before = {name: weight for name, weight in model.named_parameters() if "embed" not in name}
        expected += sum(weight.nbytes for weight in before.values())
    measured = {"refresh": refresh.total, "score": score.total}[moment]
    assert expected == pytest.approx(measured, rel=0.15), parts


def test_slices_of_g_go_as_directions_are_formed_unless_they_are_needed_again() -> None:
    """What a rank of `exact` holds of G between steps, float32."""
    held = {}
    for refresh_every in (1, 2):
        decoder = decoder_of(LlamaForCausalLM(LlamaConfig(**SMALL)))
        valuation = ValuationConfig(
            estimator="exact", layers="all", parameters="all", refresh_every=refresh_every
        )
        scorer = build_scorer(decoder, valuation, CPU, None)
        batch = make_batch(collate(random_sequences([(3, 5)], seed=1)))
        given = [*decoder.model.parameters(), *decoder.model.buffers(), *tree_leaves(batch)]
        with PeakBytes(given) as kept:
            scorer.refresh([batch])
            gc.collect()
        held[refresh_every] = kept.now
    scored = {each.name for each in decoder.scored_parameters(len(decoder.layers), "all")}
    elements = sum(decoder.model.get_parameter(name).numel() for name in scored)
    assert held[2] - held[1] == 4 * elements


def test_larger_held_out_micro_batches_are_fewer_and_take_more(tmp_path: Path) -> None:
    model = TINY["llama"].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    values: dict[str, Any] = {"layers": 2, "validation_sequences": 64}
    plans = [
        plan_of(
            "llama",
            ranks=2,
            model={"name_or_path": str(tmp_path)},
            train={"output_dir": "run", "global_batch_size": 8, "micro_batch_size": 1},
            valuation={**values, **own},
        )
        for own in ({}, {"held_out_batch_tokens": 8 * 2048})
    ]
    usual, larger = (plan.blueprint.workload.held_out_batches for plan in plans)
    assert (usual, larger) == (32, 4)
    taken = [sum(part.bytes for part in plan.memory.moments["refresh"]) for plan in plans]
    assert taken[1] > taken[0]


@pytest.mark.slow
def test_what_can_never_fit_gets_no_false_hope() -> None:
    result = CliRunner().invoke(
        app, ["plan", *written_for("llama-3.3-70b"), "--world", "1", "--gpu", "rtx4090-24g"]
    )
    assert "that is not enough" in result.output


def written_for(name: str) -> list[str]:
    """Options for a shipped configuration with another model."""
    file = ROOT / "configs" / "sft" / "quickstart.yaml"
    return ["--config", str(file), f"model.name_or_path={ROOT / 'tests' / 'models' / name}"]


def test_a_plan_is_printed_for_people_and_for_programs() -> None:
    command = ["plan", *written_for("llama-3.2-3b"), "--world", "2", "--row-tokens", "512"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    for text in (
        "activations",
        "over a plain step",
        "ghost",
        "exact",
        "one checkpoint, on disk",
        "gradients",
    ):
        assert text in shown.output
    values = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert values["parameters"]["all"] == 3_212_749_824
    assert values["memory"]["peak"] > 16 * 3.2e9 / 2 > 20 * GIB
    assert set(ESTIMATORS) == set(values["flops"])


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="--gpu h1000 is not known; known: a100-40g"):
        plan_of("llama-3.2-3b", device="h1000")
    with pytest.raises(
        UserError, match=r"train\.global_batch_size=64 is not a multiple of .* 3 ranks"
    ):
        plan_of("llama-3.2-3b", ranks=3)
    with pytest.raises(UserError, match="--row-tokens 1"):
        Rows(1)
    with pytest.raises(UserError, match=r"zero_optimization\.stage=7: write 0, 1, 2 or 3"):
        plan_of("llama-3.2-3b", deepspeed={"config": {"zero_optimization": {"stage": 7}}})


def test_held_out_pairs_are_two_documents_and_an_online_reference_runs_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    file = ROOT / "configs" / "preference" / "llama3.2_3b_ultrafeedback.yaml"

    def planned(*overrides: str) -> Plan:
        config = load(file, f"model.name_or_path={model_folder(file)}", *overrides)
        return make_plan(config, Rows(512), 8)

    def bytes_of(plan: Plan, about: str) -> float:
        return sum(each.bytes for each in plan.traffic if each.about == about)

    sft, pairs = planned(), planned("valuation.target=preference")
    one, two = sft.blueprint, pairs.blueprint
    assert two.workload.held_out_rows == 2 * one.workload.held_out_rows
    assert two.held_out_count == 2 * one.held_out_count
    for estimator, compute in sft.compute.items():
        assert pairs.compute[estimator].refresh == pytest.approx(2 * compute.refresh, rel=0.05)
    assert pairs.own.score == sft.own.score

    online = "reference={mode: online}"
    sft_online, pairs_online = planned(online), planned(online, "valuation.target=preference")
    forward = two.held_out.forward + two.workload.held_out_responses * two.head_flops
    more = two.workload.held_out_batches * forward
    assert pairs_online.own.refresh == pytest.approx(pairs.own.refresh + more)
    assert sft_online.own.refresh == sft.own.refresh
    gathered = bytes_of(sft_online, "reference weights") / one.workload.micro_batches
    times = two.workload.micro_batches + two.workload.held_out_batches
    assert bytes_of(pairs_online, "reference weights") == pytest.approx(times * gathered)
