"""One valued optimizer step under ZeRO on 1, 2 and 3 ranks against the same step in one plain
process."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alphatoken import TokenValues, ValuationConfig, score_tokens
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data import pretrained
from alphatoken.data.batches import Order
from alphatoken.distributed.ranks import allow_open_files, tensor_limit
from alphatoken.errors import UserError
from alphatoken.models import loading
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from tests.cases import shard_of
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny import CASES, SMALL, collate, tokenised

GLOBAL_BATCH, MICRO_BATCH, KEEP = 12, 2, 0.5
SCORED_BY = ("estimator", "layers", "parameters", "window")
TERMS = ("direct_target", "causal_target", "direct_proxy", "causal_proxy", "composite")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs/held-out/export", "there is no folder {here}/runs/held-out/export$"),
        ("./export", "there is no folder {here}/export$"),
        ("models/export", "there is no folder {here}/models/export; the hub has no such model$"),
        ("empty", "the hub has no such model$"),
    ],
)
def test_a_missing_folder_is_told_whether_or_not_a_hub_may_have_it(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr(pretrained, "holds_adapters", lambda _: False)
    error = OSError("the hub has no such model")
    monkeypatch.setattr(AutoConfig, "from_pretrained", raising(error))
    told = f"^reference.model={name} cannot be loaded: {reason.format(here=tmp_path)}"
    with pytest.raises(UserError, match=told):
        pretrained.read_settings(name, "reference.model")


def test_weights_of_the_hub_are_fetched_before_any_is_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks then wait for the slowest download in a control message, and not in the one that
    shares out the first weight. Copies in other formats are not fetched."""
    order: list[object] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> None:
        order.append((name, allow_patterns))
        raise OSError("no network: transformers says so")

    def agree(work: Any) -> None:
        order.append("agree")
        work()

    def read(name: str, **_: object) -> None:
        order.append("read")
        raise OSError(f"{name} cannot be had")

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    monkeypatch.setattr("alphatoken.distributed.collectives.agree", agree)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(UserError, match="cannot be loaded: some/model cannot be had"):
        loading.load_model(ModelConfig(name_or_path="some/model"), {}, seed=0)
    patterns = ["model*.safetensors", "model.safetensors.index.json"]
    assert order == ["agree", ("some/model", patterns), "read"]
    loading.fetch_weights(str(tiny_model))
    assert len(order) == 3, "a folder has its weights"


def raising(error: Exception) -> Any:
    """A function that raises it, whatever it is given."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_model_whose_files_lack_weights_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers` would fill them with random numbers, and say so in a table."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = ModelConfig(name_or_path=str(folder), attn_implementation="sdpa")
    file = folder / "model.safetensors"
    weights = load_file(file)

    def message(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as refused:
            loading.load_model(config, {}, seed=0)
        return str(refused.value)

    lacking = {name: each for name, each in weights.items() if "layers.2.mlp" not in name}
    said = message(lacking)
    assert "lack 3 weights of LlamaForCausalLM" in said
    assert "model.layers.2.mlp.down_proj.weight" in said
    said = message({f"module.{name}": each for name, each in weights.items()})
    assert "model has not: module." in said
    assert " more" in said
    wrong = {**weights, "model.norm.weight": torch.zeros(3)}
    assert "model.norm.weight" in message(wrong)
    # Under ZeRO-3 rank 0 alone finds this out, and has no names but in the text of an error.
    with monkeypatch.context() as changed:
        text = "size mismatch for model.norm.weight: copying a param with shape torch.Size([3])"
        changed.setattr(AutoModelForCausalLM, "from_pretrained", raising(RuntimeError(text)))
        with pytest.raises(
            UserError, match=r"reference\.model=\S+: the shape of model\.norm\.weight"
        ):
            loading.load_model(config, {}, seed=0, key="reference.model")
        changed.setattr(AutoModelForCausalLM, "from_pretrained", raising(RuntimeError("peer gone")))
        with pytest.raises(RuntimeError, match="peer gone"):
            loading.load_model(config, {}, seed=0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(config, {}, seed=0)


def test_ranks_wait_for_the_one_that_tokenises_longest_in_a_control_message(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[bool] = []

    def agree(work: Any) -> Any:
        waiting.append(True)
        try:
            return work()
        finally:
            waiting.pop()

    def load(*_: object) -> None:
        assert waiting
        raise UserError("it was reached")

    monkeypatch.setattr("alphatoken.distributed.collectives.agree", agree)
    monkeypatch.setattr("alphatoken.training.setup.load_splits", load)
    with pytest.raises(UserError, match="it was reached"):
        build_run(validate(RunConfig, run_values, "test"), SupervisedObjective())


class PlainStep:
    """The step in one process: values of all rows at once, masks by sorting, the gradient by
    autograd."""

    def __init__(self, values: dict[str, Any]) -> None:
        folder, valuation = values["model"]["name_or_path"], values["valuation"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = tokenised(tokenizer, values["data"]["train"])
        held_out = tokenised(tokenizer, values["data"]["validation"])
        chosen = Order([len(train)], None, (0, 0)).step(0, GLOBAL_BATCH)
        validation = Order([len(held_out)], None, (0, 1)).step(0, valuation["validation_sequences"])
        fisher, reference = stability_tensors(valuation)
        self.values = score_tokens(
            model,
            collate([train[row] for row in chosen]),
            collate([held_out[row] for row in validation]),
            fisher=fisher,
            reference=reference,
            config=ValuationConfig.model_validate(
                {key: valuation[key] for key in SCORED_BY if key in valuation}
            ),
        )
        self.places = {int(row): place for place, row in enumerate(chosen)}
        lengths = np.array([len(train[row][0]) for row in chosen])
        by_length = np.argsort(-lengths, kind="stable")
        size = {"sequence": 1, "micro_batch": MICRO_BATCH, "global_batch": GLOBAL_BATCH}[
            values["selection"]["scope"]
        ]
        groups = [by_length[start : start + size] for start in range(0, GLOBAL_BATCH, size)]
        self.weight = torch.zeros_like(self.values.composite)
        batch = collate([train[row] for row in chosen])
        response = batch["labels"][:, 1:] != -100
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        targets = batch["input_ids"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        for group in groups:
            tokens = [
                (int(place), t) for place in group for t in response[place].nonzero()[:, 0].tolist()
            ]
            for place, t in self._kept(tokens, nll, values["selection"]):
                self.weight[place, t] = 1
        kept = self.weight[:, :-1] > 0
        counted = response if normalises_by_response(values["selection"]) else kept
        (nll[kept].sum() / counted.sum()).backward()
        self.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    def _kept(
        self, tokens: list[tuple[int, int]], nll: Tensor, selection: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """What is kept of one group of (place, position): the share of highest losses is vetoed,
        and of the rest the best are kept, or those whose value is above the threshold."""
        share = selection.get("veto", {}).get("share", 0.0)
        by_loss = sorted(tokens, key=lambda token: -float(nll[token].detach()))
        left = by_loss[math.floor(share * len(tokens)) :]
        if "threshold" in selection:
            limit = selection["threshold"]
            return [token for token in left if float(self.values.composite[token]) >= limit]
        left.sort(key=lambda token: (float(self.values.composite[token]), token), reverse=True)
        return left[: math.ceil(KEEP * len(tokens))]


def normalises_by_response(selection: dict[str, Any]) -> bool:
    cuts = {"veto", "threshold"} & selection.keys()
    return bool(cuts) and selection.get("normalise") != "kept"


def stability_tensors(
    valuation: dict[str, Any],
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    if "fisher" not in valuation:
        return None, None
    from safetensors.torch import load_file

    reference = AutoModelForCausalLM.from_pretrained(valuation["reference"]).state_dict()
    return load_file(valuation["fisher"]), reference


class Plain(Protocol):
    """What one process finds: by document, the place in (N, T) values and weights; and the
    gradient."""

    places: dict[int, int]
    values: TokenValues
    weight: Tensor
    gradients: dict[str, Tensor | None]


def check(
    results: list[Any],
    name: str,
    plain: Plain,
    terms: tuple[str, ...] = TERMS,
    tolerance: float = 1e-5,
) -> None:
    rows = {row: output for rank in results for row, output in rank[name]["rows"].items()}
    assert sorted(rows) == sorted(plain.places), (
        "the ranks together must see each document of the global batch once"
    )
    for term in terms:
        actual = torch.zeros_like(plain.values.composite)
        for row, output in rows.items():
            actual[plain.places[row], : output[term].numel()] = output[term]
        error = relative_error(actual, getattr(plain.values, term))
        assert error <= tolerance, f"{name}: {term} differs from the single process by {error:.1e}"
    for row, output in rows.items():
        expected = plain.weight[plain.places[row]][: output["weight"].numel()]
        assert torch.equal(output["weight"], expected), f"{name}: document {row} keeps other tokens"
    for rank, result in enumerate(results):
        for parameter, gradient in result[name]["gradients"].items():
            whole = plain.gradients[parameter]
            assert whole is not None
            error = relative_error(gradient, whole)
            ratio = float(gradient.norm() / whole.norm())
            assert error <= tolerance, (
                f"{name}, rank {rank}: gradient of {parameter} is off by {error:.1e}, ratio "
                f"{ratio:.4f}"
            )


def variant(run_values: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """One step without evaluations, which would be a third of all passes, with some sections
    changed."""
    values = {section: dict(content) for section, content in run_values.items()}
    del values["data"]["eval"]
    values["train"] |= {"max_steps": 1, "output_dir": str(folder)}
    values["selection"] = {"keep_ratio": KEEP, "scope": "micro_batch"}
    for section, content in sections.items():
        values[section] = values.get(section, {}) | content
    return values


def exact(parameters: str, layers: int | str) -> dict[str, Any]:
    return {"estimator": "exact", "parameters": parameters, "layers": layers, "window": 32}


def stage(number: int) -> dict[str, Any]:
    return {"config": {"zero_optimization": {"stage": number}}}


# Three ranks have slices of uneven length: all variants. Two ranks: those whose messages
# differ, by what is gathered, summed or compared between ranks. One rank: those whose state
# lies differently.
ON_TWO_RANKS = (
    *("with stability", "composite only, ghost", "streamed", "packed, eager, streamed"),
    *("global batch", "stage 1", "stage 2, streamed", "exact, all", "exact, global batch"),
    *("exact, stage 2", "veto, global batch", "veto and threshold, packed"),
)
ON_ONE_RANK = ("with stability", "stage 0", "stage 2, streamed", "exact, all")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_masks_and_gradient_equal_one_process(
    world_size: int, run_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    streamed = {**stability, "residency": "streamed"}
    unstable = {"stability_weight": 0.0}  # no Fisher, which would be estimated first
    variants: dict[str, dict[str, dict[str, Any]]] = {
        "no stability": {},
        "with stability": {"valuation": stability},
        "ghost, chunked": {"valuation": {**stability, "contraction": "ghost", "chunk_tokens": 1}},
        "composite only": {"valuation": {**stability, "split_terms": False, "chunk_tokens": 200}},
        "composite only, ghost": {
            "valuation": {**stability, "split_terms": False, "contraction": "ghost"}
        },
        "streamed": {"valuation": {**streamed, "contraction": "materialised", "chunk_tokens": 1}},
        "streamed ghost": {"valuation": {**streamed, "contraction": "ghost"}},
        "checkpointed": {"valuation": stability, "train": {"gradient_checkpointing": True}},
        "packed": {"valuation": stability, "data": {"packing": True, "max_length": 400}},
        "packed, eager, streamed": {
            "valuation": streamed,
            "data": {"packing": True},
            "model": {"attn_implementation": "eager"},
        },
        "sequence": {"selection": {"scope": "sequence"}, "valuation": unstable},
        "global batch": {"selection": {"scope": "global_batch"}, "valuation": unstable},
        "veto, global batch": {
            "selection": {
                "scope": "global_batch",
                "veto": {"by": "low_perplexity", "share": 0.25},
                "normalise": "kept",
            },
            "valuation": unstable,
        },
        "veto and threshold, packed": {
            "selection": {
                "veto": {"by": "low_perplexity", "share": 0.25},
                "threshold": 0.0,
                "keep_ratio": None,
            },
            "valuation": unstable,
            "data": {"packing": True},
        },
        "global batch, streamed, packed": {
            "selection": {"scope": "global_batch"},
            "valuation": streamed,
            "data": {"packing": True, "max_length": 130},  # a micro-batch has several rows
        },
        **{
            f"stage {number}": {"valuation": stability, "deepspeed": stage(number)}
            for number in (0, 1, 2)
        },
        "stage 2, streamed": {"valuation": streamed, "deepspeed": stage(2)},
        "exact": {"valuation": {**exact("linears", 2), **unstable}},
        "exact, norms": {"valuation": {**exact("norms", "all"), **unstable}},
        "exact, all": {"valuation": {**exact("all", "all"), **stability}},
        "exact, all, resident, chunked": {
            "valuation": {
                **exact("all", "all"),
                **stability,
                "residency": "resident",
                "chunk_tokens": 1,
            }
        },
        "exact, composite only, packed, checkpointed": {
            "valuation": {**exact("all", 2), **stability, "split_terms": False},
            "data": {"packing": True},
            "train": {"gradient_checkpointing": True},
        },
        "exact, global batch": {
            "valuation": {**exact("all", 2), **unstable},
            "selection": {"scope": "global_batch"},
        },
        "exact, stage 2": {
            "valuation": {**exact("all", "all"), **stability},
            "deepspeed": stage(2),
        },
    }
    names = {1: ON_ONE_RANK, 2: ON_TWO_RANKS, 3: tuple(variants)}[world_size]
    configs = {
        name: variant(run_values, tmp_path / name.replace(" ", "-"), **variants[name])
        for name in names
    }
    results = run_ranks("valued_steps", world_size, tmp_path / "ranks", configs=configs)
    plain: dict[str, PlainStep] = {}
    for name, values in configs.items():
        chosen = [values["valuation"].get(key) for key in SCORED_BY]
        key = json.dumps(["fisher" in values["valuation"], values["selection"], *chosen])
        if key not in plain:
            plain[key] = PlainStep(values)
            assert plain[key].values.direct_proxy.any() == ("fisher" in values["valuation"])
        check(
            results,
            name,
            plain[key],
            TERMS if values["valuation"].get("split_terms", True) else ("composite",),
        )


@pytest.mark.slow
def test_rank_0_tells_the_others_and_is_told(tmp_path: Path) -> None:
    results = run_ranks("told_by_rank_0", 3, tmp_path)
    assert [each["done"] for each in results] == 3 * [{"by": 0, "what": ["a", 1]}]
    own, *others = (each["failure"] for each in results)
    assert own == "IndexError: list index out of range"
    assert others == 2 * ["RemoteError: rank 0: list index out of range"]
    told, *nothing = (each["told"] for each in results)
    assert told == [{"rank": rank} for rank in range(3)]
    assert nothing == [[], []]


def test_open_files_are_allowed_for_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_open_files(1024)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024 + 3 * 1024, before[1])
        allow_open_files(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024 + 3 * 1024, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4095))
    with pytest.raises(UserError, match=r"4096 open files, but this machine allows 4095"):
        allow_open_files(1024)


@pytest.mark.slow
def test_a_choice_among_the_whole_step_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Of pairs whose branches have different vetoes, `keep_ratio: auto` and soft weights, with
    unequally many tokens on each rank and none at all on one."""
    results = {
        ranks: run_ranks("chosen_globally", ranks, tmp_path / str(ranks)) for ranks in (1, 2, 3)
    }
    ((kept, alone),) = results[1]
    assert kept == sum(int(found["kept_R"].sum()) for found in alone.values())
    fates = {
        name: torch.cat([found[name] for found in alone.values()])
        for name in ("kept_R", "vetoed_R", "below_R", "weight_R")
    }
    assert all(fate_R.any() for fate_R in fates.values())
    assert not fates["kept_R"].all()
    for ranks, by_rank in results.items():
        found = {number: choice for _, own in by_rank for number, choice in own.items()}
        assert found.keys() == alone.keys()
        assert {kept for kept, _ in by_rank} == {kept}
        for number, choice in found.items():
            for name, fate_R in alone[number].items():
                assert choice[name].equal(fate_R), (ranks, number, name)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["resident", "streamed", "exact"])
def test_a_rank_without_response_tokens_takes_part(
    way: str, run_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """In the second micro-batch of three, rank 1 has nothing to score, nothing to keep, and no
    loss."""
    valuation = exact("all", "all") if way == "exact" else {"residency": way}
    values = variant(run_values, tmp_path / "run", valuation={**stability, **valuation})
    results = run_ranks("one_empty_micro_batch", 2, tmp_path / "ranks", values=values)
    assert results[1]["kept"][1] == 0
    assert results[1]["kept"][0] > 0
    check_gradients_of_kept(results, values["model"]["name_or_path"])


def check_gradients_of_kept(
    results: list[dict[str, Any]], folder: str, tolerance: float = 1e-5
) -> None:
    """Gradients of `one_empty_micro_batch` against autograd's, of the tokens that were kept."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for kept in (kept for result in results for kept in result["tokens"]):
        ids, weight = kept["ids"], kept["weight"]
        logits = model(input_ids=ids).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        (nll * weight[:, :-1]).sum().backward()
    total = sum(sum(result["kept"]) for result in results)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for result in results:
            assert relative_error(result["gradients"][name], parameter.grad / total) <= tolerance, (
                name
            )


@pytest.mark.slow
def test_other_architectures_train_and_score_under_zero(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps under ZeRO-3 on two ranks give the metrics of one process with whole weights, with
    either estimator, or with the one that an architecture is special to; of every parameter with a
    Fisher of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    monkeypatch.setitem(SMALL, "vocab_size", len(tokenizer))
    monkeypatch.setitem(SMALL, "max_position_embeddings", 512)
    every_parameter = {**exact("all", "all"), "validation_sequences": 5}
    valuations: dict[str, dict[str, Any]] = {
        "ghost": {**run_values["valuation"], "stability_weight": 0.0},
        "exact": every_parameter,
    }
    names = {
        **dict.fromkeys(("qwen3_5", "mixtral", "gemma3", "gpt2"), ("ghost", "exact")),
        **dict.fromkeys(("phi3", "gpt_neox"), ("ghost",)),  # values are rows of a fused linear
        **dict.fromkeys(("qwen3_moe", "gemma2"), ("exact",)),
    }
    for name in names:
        CASES[name].build().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def metrics(ranks: int, zero_stage: int) -> dict[str, list[dict[str, float]]]:
        configs = {}
        for name, estimators in names.items():
            model = {"name_or_path": str(tmp_path / name), "dtype": "float32"}
            model["attn_implementation"] = "eager" if CASES[name].eager_only else "sdpa"
            for estimator in estimators:
                run = f"{name}, {estimator}"
                train = {**run_values["train"], "output_dir": str(tmp_path / f"{run}-{ranks}")}
                sections = {
                    "model": model,
                    "train": train,
                    "valuation": valuations[estimator],
                    "deepspeed": stage(zero_stage),
                }
                configs[run] = {**run_values, **sections}
        (messages, *_) = run_ranks(
            "run_trainers", ranks, tmp_path / f"ranks-{ranks}", configs=configs
        )
        assert not any(messages.values()), messages
        files = {run: tmp_path / f"{run}-{ranks}" / "metrics.jsonl" for run in configs}
        return {
            name: [json.loads(line) for line in file.read_text().splitlines()]
            for name, file in files.items()
        }

    alone, sharded = metrics(1, 1), metrics(2, 3)
    for name in alone:
        for one, two in zip(alone[name], sharded[name], strict=True):
            assert one.keys() == two.keys()
            for key in one.keys() & {
                "loss_kept",
                "loss_response",
                "grad_norm",
                "composite_std",
                "eval_loss",
            }:
                assert two[key] == pytest.approx(one[key], rel=1e-4), (
                    f"{name}: {key} of step {one['step']}"
                )


@pytest.mark.slow
def test_a_shard_gathered_in_several_messages_is_whole(tmp_path: Path) -> None:
    lengths = [0, 1, 7, 8, 9, 16, 29]  # messages of 8 numbers
    results = run_ranks("long_gathers", 3, tmp_path, lengths=lengths, message_bytes=32)
    for result in results:
        for length, gathered in zip(lengths, result, strict=True):
            assert torch.equal(gathered, torch.stack([shard_of(rank, length) for rank in range(3)]))


def test_no_program_is_started_to_count_cpus(tmp_path: Path) -> None:
    """With the variables that torchrun sets, too: DeepSpeed's launcher sets one more."""
    assert run_ranks("counted_devices", 2, tmp_path) == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "agreed", "told"),
    [
        ([1], False, [None, "error: rank 1: "]),  # rank 0 waits for it
        ([0, 1], False, ["error: ", None]),
        ([1], True, ["error: rank 1: ", None]),
    ],
)
def test_bad_input_is_told_once_whichever_rank_finds_it(
    failing: list[int], agreed: bool, told: list[str | None], tmp_path: Path
) -> None:
    said = run_ranks("told_of_failure", 2, tmp_path, failing=failing, agreed=agreed)
    lines = [text.splitlines()[:1] for text in said]
    assert lines == [[f"{start}rows.parquet is damaged"] if start else [] for start in told]


@pytest.mark.slow
def test_ranks_wait_for_work_on_rank_0_longer_than_for_tensors(tmp_path: Path) -> None:
    """What one rank does for all may take longer than a message of tensors may: nobody dies, and
    tensors still arrive. A rank that is late for a message of tensors is given up."""
    arguments = {"limit_seconds": 6.0, "work_seconds": 9.0}
    first, second = run_ranks("slow_rank_0", 2, tmp_path, **arguments)
    assert first["done"] == second["done"] == "done"
    assert first["ranks"] == second["ranks"] == 2.0
    assert "imed out" in second["lost"]


def test_the_limit_of_tensors_is_ours_or_deepspeeds_never_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert tensor_limit(None).total_seconds() == 30 * 60
    assert tensor_limit(0.5).total_seconds() == 30
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "45")
    assert tensor_limit(None) == tensor_limit(45.0)
    assert tensor_limit(None).total_seconds() == 45 * 60
    with pytest.raises(UserError, match=r"timeout_minutes=20, but .* DEEPSPEED_TIMEOUT=45"):
        tensor_limit(20.0)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1h")
    with pytest.raises(UserError, match="DEEPSPEED_TIMEOUT=1h is not a whole number of minutes"):
        tensor_limit(None)
