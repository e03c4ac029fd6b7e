"""Metrics of each source of a mixture add up to those of all, and do not depend on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source, source_names
from alphatoken.data.batches import Order
from alphatoken.data.cache import TokenDataset
from alphatoken.data.splits import load_splits
from alphatoken.errors import UserError
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of

STEPS, BATCH = 3, 4
NAMES = ("train", "long", "rare")


def mixture(values: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """30 short rows, 7 long ones that come as often, and one that few steps have."""
    is_pairs = "preference" in values
    sources = [{"path": values["data"]["train"], "weight": 1.0}]
    for name, rows, weight in (("long", 7, 1.0), ("rare", 1, 0.2)):
        file = folder / f"{name}.v2.jsonl"
        prompts = [f"{name} {number}?" for number in range(rows)]
        answer = "one two three " * (8 if name == "long" else 2)
        answers = {"chosen": answer, "rejected": "no no"} if is_pairs else {"response": answer}
        lines = [json.dumps({"prompt": prompt, **answers}) + "\n" for prompt in prompts]
        file.write_text("".join(lines))
        sources.append({"path": str(file), "name": name, "weight": weight})
    return sources


def run_of(values: dict[str, Any], folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    train = {"global_batch_size": BATCH, "max_steps": STEPS, "output_dir": str(folder / name)}
    rows = folder / f"{name}-rows"
    rows.mkdir(parents=True)
    sections = {**sections, "data": {"train": mixture(values, rows)}}
    return changed(values, **sections, train=train)


def tokens_by_source(dataset: TokenDataset, seed: int) -> list[list[int]]:
    """Response tokens of each source in each step."""
    ends = [sum(dataset.sizes[: place + 1]) for place in range(len(dataset.sizes))]
    found = []
    for step in range(STEPS):
        counts = [0] * len(ends)
        for row in Order(dataset.sizes, dataset.weights, (seed, 0)).step(step, BATCH).tolist():
            source = next(place for place, end in enumerate(ends) if row < end)
            counts[source] += sum(int(mask[1:].sum()) for _, mask in dataset[row])
        found.append(counts)
    return found


@pytest.mark.slow
def test_what_sources_contribute_adds_up_on_any_number_of_ranks(
    run_values: dict[str, Any],
    pair_values: dict[str, Any],
    tiny_fisher: Path,
    tmp_path: Path,
) -> None:
    """On two ranks each has one micro-batch of a step: one the long rows, one the short ones."""
    valued = {"valuation": {"fisher": str(tiny_fisher)}}
    runs: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        configs = {
            "valued": run_of(run_values, folder, "valued", **valued),
            "plain": run_of(run_values, folder, "plain", valuation={"enabled": False}),
            "pairs": run_of(pair_values, folder, "pairs", **valued),
        }
        done = run_ranks("run_trainers", ranks, folder / "ranks", configs=configs)
        assert done == [dict.fromkeys(configs, "")] * ranks
        runs[ranks] = {name: metrics_of(folder / name)[1:] for name in configs}

    tokenizer = AutoTokenizer.from_pretrained(run_values["model"]["name_or_path"])
    for name, values in configs.items():
        kind = PreferenceRunConfig if name == "pairs" else RunConfig
        config = validate(kind, values, "of the test")
        train = load_splits(config, tokenizer).train
        by_step = tokens_by_source(train, config.train.seed)
        assert any(0 in counts for counts in by_step), "a step without a source"
        assert any(len(counts) - counts.count(0) > 1 for counts in by_step)
        for step, other, counts in zip(runs[1][name], runs[2][name], by_step, strict=True):
            of_sources = {key for key in step if "/" in key}
            assert of_sources == {key for key in other if "/" in key}
            for key in of_sources:
                assert step[key] == pytest.approx(other[key], rel=2e-3, abs=1e-9), key
            check_sums(step, dict(zip(NAMES, counts, strict=True)), valued=name != "plain")
    check_losses(runs[1]["plain"][0], run_values["model"]["name_or_path"], train_of(configs))


def train_of(configs: dict[str, dict[str, Any]]) -> TokenDataset:
    config = validate(RunConfig, configs["plain"], "of the test")
    return load_splits(config, AutoTokenizer.from_pretrained(config.model.name_or_path)).train


def check_sums(step: dict[str, Any], tokens: dict[str, int], *, valued: bool) -> None:
    """Against the numbers of all rows together, and what the rows have."""
    there = [name for name, count in tokens.items() if count]
    assert {f"kept_share/{name}" for name in there} == {
        key for key in step if key.startswith("kept_share/")
    }
    kept = {name: step[f"kept_share/{name}"] * tokens[name] for name in there}
    assert sum(kept.values()) == pytest.approx(step["kept_tokens"])
    loss = sum(step[f"loss_kept/{name}"] * count for name, count in kept.items() if count)
    assert loss == pytest.approx(step["loss_kept"] * step["kept_tokens"])
    if valued:
        value = sum(step[f"composite_mean/{name}"] * tokens[name] for name in there)
        assert value == pytest.approx(step["composite_mean"] * step["response_tokens"])
    else:
        assert kept == pytest.approx({name: tokens[name] for name in there})
        assert not [key for key in step if key.startswith("composite_mean")]


def check_losses(step: dict[str, Any], model_folder: str, train: TokenDataset) -> None:
    """Before the weights move, against the model's own losses of the rows."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for row in Order(train.sizes, train.weights, (0, 0)).step(0, BATCH).tolist():
        ((ids, mask),) = train[row]
        tokens = torch.tensor(ids.tolist())
        with torch.no_grad():
            logits_TV = model(tokens[None]).logits[0, :-1]
        loss_T = cross_entropy(logits_TV, tokens[1:], reduction="none")
        name = next(name for name in NAMES if Path(train.location(row)).name.startswith(name))
        losses[name].append(loss_T[torch.tensor(mask.tolist())[1:]])
    assert sum(bool(each) for each in losses.values()) > 1
    for name, of_rows in losses.items():
        if of_rows:
            expected = float(torch.cat(of_rows).mean())
            assert step[f"loss_kept/{name}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["rows/a.jsonl.gz", "b.v2.parquet", "org/set-1.5B", "s3://x/part-*.csv"], None),
        (["a.jsonl", "folder/a.json", "b.json"], ["a-1", "a-2", "b"]),
        ([{"path": "a.jsonl", "name": "a b/c"}, "a.jsonl"], ["a b/c", "a"]),
        ([{"path": "x", "name": "a"}, "a.jsonl"], ["a", "a-2"]),
        (["saved/folder/", ".jsonl"], ["folder", ".jsonl"]),
    ],
)
def test_sources_have_names(sources: list[Any], names: list[str] | None) -> None:
    given = [{"path": each} if isinstance(each, str) else each for each in sources]
    found = source_names([Source(**each) for each in given])
    assert found == (names or ["a", "b.v2", "set-1.5B", "part-*"])


def test_names_that_are_given_twice_are_refused(run_values: dict[str, Any]) -> None:
    alike = [{"path": "a.jsonl", "name": "a"}, {"path": "b.jsonl", "name": "a"}]
    values = changed(run_values, data={"train": alike})
    with pytest.raises(UserError, match=r"two sources of data.train are named 'a'; change a name"):
        validate(RunConfig, values, "of the test")
    values = changed(run_values, data={"eval": alike})
    validate(RunConfig, values, "of the test")  # of these, there are no metrics by source
