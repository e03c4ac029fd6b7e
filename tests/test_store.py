"""Values that are made once and trained with later."""

from __future__ import annotations

import errno
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.select import select
from alphatoken.store.rows_folder import Contents, RowsFolder
from alphatoken.training.feed import Feed, held_out_refresh
from alphatoken.training.setup import Run, build_run
from alphatoken.training.trainer import Trainer
from alphatoken.training.valuing import check_valuing, run_valuing, value_rows
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of, run_recipe


def written(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def run_of(values: dict[str, Any]) -> Run:
    return build_run(RunConfig.model_validate(values), SupervisedObjective())


def table_of(folder: Path) -> pa.Table:
    """All rows of a store, in order."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def numbers(table: pa.Table, name: str) -> torch.Tensor:
    """A column of all response tokens."""
    return torch.tensor(np.concatenate(table.column(name).to_numpy()))


def stored(values: dict[str, Any], store: Path, **selection: Any) -> dict[str, Any]:
    """The configuration of a run that trains by a store."""
    chosen = {"policy": "stored", "store": str(store), **selection}
    return changed({**values, "valuation": {"enabled": False}}, selection=chosen)


def kept_in_first_step(run: Run) -> list[torch.Tensor]:
    feed = Feed(run)
    refresh = held_out_refresh(run, feed)
    if refresh is not None:
        refresh.before(0, 1)
    facts = [run.model.assess(batch) for batch in feed.training(0).batches]
    return [select(run.model.selections, each).choice.kept_R for each in facts]


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [{"contrast_from": "drawn"}, {"reliability": True}])
def test_a_store_gives_the_masks_of_scoring_while_training(
    run_values: dict[str, Any], contrast: dict[str, Any]
) -> None:
    """Also where B is of scored tokens, of which there are none before: of the first step's rows,
    in halves."""
    run_values["valuation"] |= {"contrast": 1.0, **contrast}
    online = run_of(run_values)
    expected = kept_in_first_step(online)
    store = value_rows(online)
    assert store == Path(run_values["train"]["output_dir"]) / "values"
    run = run_of(stored(run_values, store))
    assert run.model.scorer is None
    found = kept_in_first_step(run)
    assert 0 < sum(int(kept_R.sum()) for kept_R in found) < sum(map(len, found))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_store_says_of_every_response_token_what_it_is_worth(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    run_values["valuation"] |= {"reliability": True}
    run = run_of(changed(run_values, selection={"scope": "sequence", "min_keep": 1}))
    part, table = run.splits.train, table_of(value_rows(run))
    assert table.column("row").to_pylist() == list(range(len(part)))
    for row, fields in enumerate(table.to_pylist()):
        ((ids, mask),) = part[row]
        assert fields["id"] == [token for token, own in zip(ids[1:], mask[1:], strict=True) if own]
        assert {len(fields[name]) for name in fields if name != "row"} == {len(fields["id"])}
        terms = np.array(fields["direct_target"]) + np.array(fields["causal_target"])
        assert relative_error(torch.tensor(fields["value"]), torch.tensor(terms)) <= 1e-5
        kept = np.array(fields["kept"])
        assert kept.sum() == max(1, -(-len(kept) // 2))  # the better half
        assert np.array(fields["value"])[kept].min() >= np.array(fields["value"])[~kept].max(
            initial=-np.inf
        )
        assert all(nll > 0 for nll in fields["nll"])
        assert len(fields["spread"]) == len(kept)


@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_terms_that_were_not_computed_are_not_stored(
    run_values: dict[str, Any], estimator: str
) -> None:
    valuation = {"estimator": estimator, "split_terms": False, "reliability": True}
    values = changed(run_values, valuation={**valuation, "stability_weight": 0.0})
    if estimator == "exact":
        del values["valuation"]["window"]
    table = table_of(value_rows(run_of(values)))
    assert set(table.column_names) == {"row", "id", "value", "spread", "nll", "kept"}
    assert bool((numbers(table, "value") != 0).any())


def test_valuing_collects_nothing_for_steps_that_do_not_come(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B of scored tokens is for later steps, and costs an outer product per token and linear. A run
    that goes on afterwards collects."""
    added: list[str] = []
    monkeypatch.setattr(
        "alphatoken.values.ghost.scored_mean.ScoredMean.add",
        lambda _, name, *signals: added.append(name),
    )
    run_values["valuation"] |= {"contrast": 1.0, "stability_weight": 0.0}
    run = run_of(run_values)
    table = table_of(value_rows(run))
    assert not added
    assert bool((numbers(table, "direct_contrast") != 0).any()), "B is of drawn rows"
    (batch, *_) = Feed(run).training(0).batches
    run.model.assess(batch)
    assert added


@pytest.mark.slow
def test_a_killed_valuation_goes_on_where_it_was_on_any_number_of_ranks(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    values = {
        name: changed(run_values, selection={"store": str(store)})
        for name, store in {"whole": whole, "killed": killed}.items()
    }
    with pytest.raises(AssertionError, match="killed in block 3"):
        run_ranks(
            "valued_rows",
            2,
            tmp_path / "first",
            configs={"killed": values["killed"]},
            block_rows=8,
            killed_in_block=3,
        )
    before = {file.name: file.read_bytes() for file in sorted(killed.glob("*.parquet"))}
    assert list(before) == ["rows-000000000-000000008.parquet", "rows-000000008-000000016.parquet"]
    (messages, _, _) = run_ranks(
        "valued_rows", 3, tmp_path / "second", configs=values, block_rows=8
    )
    assert messages == {"whole": "", "killed": ""}
    for name, content in before.items():
        assert (killed / name).read_bytes() == content, "what was there is used"
    one, other = table_of(whole), table_of(killed)
    assert one.num_rows == 30
    assert one.column("kept").to_pylist() == other.column("kept").to_pylist()
    for name in ("value", "direct_target", "causal_target", "nll"):
        columns = (
            torch.tensor(np.concatenate(table.column(name).to_numpy())) for table in (one, other)
        )
        assert relative_error(*columns) <= 1e-5, name


@pytest.mark.slow
def test_pairs_have_values_of_both_responses(pair_values: dict[str, Any], tmp_path: Path) -> None:
    pair_values["selection"] = {"store": str(tmp_path / "store")}
    run_valuing(validate(PreferenceRunConfig, pair_values, "test"))
    table = table_of(tmp_path / "store")
    values = numbers(table, "value")
    assert values.isfinite().all()
    assert (values != 0).any()
    finished = run_recipe(
        written(tmp_path / "run.yaml", stored(pair_values, tmp_path / "store")),
        recipe="preference",
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "selection", [{"policy": "stored"}, {"veto": {"by": "stored", "threshold": 0.0}}]
)
def test_pairs_with_stored_values_are_steered_by_other_training_pairs(
    pair_values: dict[str, Any], selection: dict[str, Any]
) -> None:
    """Those are held out by their chosen responses alone, without stored values; rows of B, which a
    veto by stored values is asked about, have them."""
    values = changed(pair_values, valuation={"stability_weight": 0.0})
    objective = PreferenceObjective(validate(PreferenceRunConfig, values, "test").preference)
    store = value_rows(build_run(validate(PreferenceRunConfig, values, "test"), objective))
    values = changed(
        values,
        selection={"store": str(store), **selection},
        valuation={"held_out": "train", "contrast": 1.0, "contrast_from": "drawn"},
    )
    del values["data"]["validation"]
    run = build_run(validate(PreferenceRunConfig, values, "test"), objective)
    feed = Feed(run)
    assert all("stored_value" not in batch for batch in feed.held_out(0))
    assert all("stored_value" in batch for batch in feed.contrast(0))
    Trainer(run).train()
    assert metrics_of(values["train"]["output_dir"])[-1]["kept_tokens"] > 0


@pytest.mark.slow
def test_a_store_of_other_tokens_is_refused(run_values: dict[str, Any], tmp_path: Path) -> None:
    store = value_rows(run_of(run_values))
    longer = changed(run_values, data={"max_length": 999})
    with pytest.raises(UserError, match=r"(?s)values of other tokens than this run .*max_length"):
        run_of(stored(longer, store))
    rows = [{"path": run_values["data"]["train"], "first": 20}]
    with pytest.raises(UserError, match=r"rows: 30 there, 20 here"):
        run_of(stored(changed(run_values, data={"train": rows}), store))
    with pytest.raises(
        UserError, match=r"(?s)holds values of something else.*window: 4 there, 5 here"
    ):
        value_rows(run_of(changed(run_values, valuation={"window": 5})))
    (file,) = store.glob("*.parquet")
    file.rename(store / "rows-000000001-000000030.parquet")
    with pytest.raises(UserError, match=r"has values of 0 of 30 rows; start .*value_tokens"):
        run_of(stored(run_values, store))
    with pytest.raises(UserError, match=r"has no settings.json; make it with recipes/value_tokens"):
        run_of(stored(run_values, tmp_path / "nothing"))


@pytest.mark.slow
def test_values_of_other_settings_are_not_taken_for_those_asked_for(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Of adapters whose scale differs, of rows that are laid out together otherwise, or of another
    B, which another order of data.train gives."""
    path = run_values["data"]["train"]

    def mixture(weight: float) -> list[dict[str, Any]]:
        return [
            {"path": path, "first": 20, "weight": 1},
            {"path": path, "skip": 20, "weight": weight},
        ]

    values = changed(
        run_values,
        model={"lora": {"r": 2}},
        data={"train": mixture(1)},
        valuation={"contrast": 1.0, "validation_sequences": 2, "stability_weight": 0.0},
        train={"global_batch_size": 8},
    )
    value_rows(run_of(values))
    cases: list[tuple[dict[str, dict[str, Any]], str]] = [
        ({"model": {"lora": {"r": 2, "alpha": 4}}}, "lora: .*'alpha': 16.0.* there"),
        ({"data": {"packing": True}}, "packing: False there, True here"),
        ({"train": {"global_batch_size": 6}}, "global_batch_size: 8 there, 6 here"),
        ({"data": {"train": mixture(2)}}, r"weights: \[1.0, 1.0\] there, \[1.0, 2.0\] here"),
    ]
    for changes, difference in cases:
        with pytest.raises(UserError, match=rf"(?s)holds values of something else.*{difference}"):
            value_rows(run_of(changed(values, **changes)))


@pytest.mark.slow
def test_values_whose_b_held_what_is_vetoed_are_not_continued(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of older versions, with drawn rows and a veto by a threshold. All others are what they
    were, and say of themselves what they said."""
    monkeypatch.setattr("alphatoken.training.valuing.fill", lambda *_, **__: None)
    marks: dict[str, set[str]] = {}
    by_threshold, by_share = (
        {"by": "probability", "threshold": 0.1},
        {"by": "probability", "share": 0.1},
    )
    cases: dict[str, tuple[str, dict[str, Any] | None]] = {
        "vetoed": ("drawn", by_threshold),
        "of a group": ("drawn", by_share),
        "all": ("drawn", None),
        "of before": ("scored", by_threshold),
    }
    for name, (contrast_from, veto) in cases.items():
        values = changed(
            run_values,
            valuation={"contrast": 0.5, "contrast_from": contrast_from, "stability_weight": 0.0},
            selection={"store": str(tmp_path / name)},
        )
        values["selection"]["veto"] = veto
        settings = value_rows(run_of(values)) / "settings.json"
        found = json.loads(settings.read_text())
        marks[name] = {key for key in found if key.startswith("B ")}
        older = {key: value for key, value in found.items() if key not in marks[name]}
        settings.write_text(json.dumps(older))
        if name == "vetoed":
            message = (
                r"(?s)holds values of something else; remove it, or set selection.store to "
                r"another folder.*B without what selection.veto rules out: None there, True here"
            )
            with pytest.raises(UserError, match=message):
                value_rows(run_of(values))
        else:
            value_rows(run_of(values))
    assert {name for name, found in marks.items() if found} == {"vetoed"}


def test_threads_take_turns_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training rows are read ahead in a thread, while those of B or held-out ones may be read."""
    folder = RowsFolder(tmp_path / "rows", 256, {}, Contents("values", "values", "selection.store"))
    folder.add(0, {"value": [np.full(3, row, np.float32) for row in range(256)]})
    read, inside, most = pq.ParquetFile.read_row_group, [], []

    def watched(self: pq.ParquetFile, group: int, **how: Any) -> pa.Table:
        inside.append(group)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(group)
        return read(self, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    column = folder.column("value")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(column.__getitem__, range(0, 256, 64)))
    assert [numbers.tolist() for numbers in found] == [[row] * 3 for row in range(0, 256, 64)]
    assert most == [1, 1, 1, 1]


def damaged(store: Path) -> Path:
    """The only file of a store, with a flipped bit among its values."""
    (file,) = store.glob("*.parquet")
    table = pq.ParquetFile(file).metadata.row_group(0)
    (column,) = (
        table.column(place)
        for place in range(table.num_columns)
        if table.column(place).path_in_schema.startswith("value.")
    )
    content = bytearray(file.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    return file


@pytest.mark.slow
def test_damage_of_a_store_is_named_when_it_is_read(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """A flipped bit among the values, which would be another value, of a row that a thread reads
    ahead; and settings that are none."""
    store = value_rows(run_of(run_values))
    file = damaged(store)
    run = run_of(stored(run_values, store))
    with pytest.raises(UserError, match=rf"{file} is damaged .*; remove it, and its values are"):
        Feed(run).training(0)
    (store / "settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"settings.json cannot be read: it holds no settings"):
        run_of(stored(run_values, store))


@pytest.mark.slow
def test_values_of_pairs_depend_on_the_objective(
    pair_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = changed(
        pair_values,
        selection={"store": str(tmp_path / "store")},
        valuation={"target": "preference"},
        preference={"beta": 0.1},
    )
    run_valuing(validate(PreferenceRunConfig, values, "test"))
    said = capsys.readouterr().out
    assert f"data.train: {pair_values['data']['train']}: 30 rows, " in said
    assert "what is trained: " in said
    with pytest.raises(UserError, match=r"preference\.beta: 0.1 there, 0.5 here"):
        run_valuing(
            validate(PreferenceRunConfig, changed(values, preference={"beta": 0.5}), "test")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valuation": {"enabled": False}}, "valuation.enabled=false: there is nothing to value"),
        ({"valuation": {"start_step": 4}}, "valuation.start_step=4"),
        ({"selection": {"scope": "global_batch"}}, "selection.scope=global_batch chooses among"),
        (
            {"selection": {"policy": "stored", "store": "values"}},
            "selection reads stored values .* which are made here",
        ),
        (
            {"valuation": {"held_out": "train", "stability_weight": 0.0}},
            "valuation.held_out=train takes held-out rows from data.train, .* all valued here: .*; "
            "leave it at validation",
        ),
        (
            {"valuation": {"balance": "std", "fisher": "F", "reference": "R"}},
            "valuation.balance=std divides by .* steps before, .*valuation.reference=R .*count "
            "nothing; set valuation.balance=none",
        ),
    ],
)
def test_what_cannot_be_valued_is_said_first(
    run_values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    values = changed(run_values, **changes)
    if "held_out" in changes.get("valuation", {}):
        del values["data"]["validation"]
    with pytest.raises(UserError, match=message):
        check_valuing(RunConfig.model_validate(values))


def test_a_balance_is_not_refused_where_there_is_nothing_to_balance(
    run_values: dict[str, Any],
) -> None:
    """Without another reference the weights have not moved, so stability is zero either way."""
    values = changed(run_values, valuation={"balance": "std", "fisher": "F"})
    check_valuing(RunConfig.model_validate(values))
    still = {"reference": "R", "stability_weight": 0.0}
    check_valuing(RunConfig.model_validate(changed(values, valuation=still)))


@pytest.mark.parametrize(
    ("contrast", "step_rows", "in_b"),
    [
        ({}, 12, 0),
        ({"contrast": 1.0}, 12, 5),
        ({"contrast": 1.0, "contrast_from": "drawn"}, 28, 2),
    ],
)
def test_it_is_said_how_many_rows_have_their_own_gradient_in_b(
    run_values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    contrast: dict[str, Any],
    step_rows: int,
    in_b: int,
) -> None:
    """B is of training rows that are not in the first step, as many as held-out ones where there
    are so many; all rows are valued."""
    values = changed(
        run_values,
        valuation={"stability_weight": 0.0, **contrast},
        train={"global_batch_size": step_rows},
    )
    run_valuing(RunConfig.model_validate(values))
    printed = capsys.readouterr().out
    said = re.findall(r"B \(valuation.contrast\) is of (\d+) of the 30 rows", printed)
    assert said == [str(in_b)] * bool(in_b)


@pytest.mark.slow
def test_a_run_with_checkpoints_is_not_valued_as_what_it_began_with(
    run_values: dict[str, Any],
) -> None:
    values = changed(run_values, train={"save_every": 2, "resume": "auto"})
    Trainer(run_of(values)).train()
    with pytest.raises(UserError, match=r"run holds a run with checkpoints, and values are of"):
        run_valuing(RunConfig.model_validate(values))


@pytest.mark.slow
def test_the_recipe_values_and_another_trains_by_it(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    valuing = changed(run_values, selection={"store": str(store)})
    finished = run_recipe(written(tmp_path / "value.yaml", valuing), recipe="value_tokens")
    assert finished.returncode == 0, finished.stderr
    assert f"{store}: values of 30 rows" in finished.stdout
    finished = run_recipe(written(tmp_path / "train.yaml", stored(run_values, store)))
    assert finished.returncode == 0, finished.stderr
    steps = metrics_of(run_values["train"]["output_dir"])
    assert steps[-1]["kept_tokens"] == pytest.approx(steps[-1]["response_tokens"] / 2, rel=0.2)


def exported(values: dict[str, Any], folder: Path, form: str, name: str) -> str:
    """Runs the command; returns what it prints."""
    file = written(folder / "run.yaml", values)
    command = ["values", "export", str(folder / name), "--config", str(file), "--format", form]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    return result.output


def test_exported_rows_have_labels_on_what_is_kept(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = changed(run_values, selection={"scope": "sequence"})
    run = run_of(values)
    table = table_of(value_rows(run))
    printed = exported(values, tmp_path, "parquet", "rows.parquet")
    kept, count = int(numbers(table, "kept").sum()), len(numbers(table, "kept"))
    assert f"30 rows, labels on {kept} of {count} response tokens" in printed
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    for row, stored_row, exported_row in zip(range(30), table.to_pylist(), rows, strict=True):
        ((ids, mask),) = run.splits.train[row]
        assert exported_row["input_ids"] == ids.tolist()
        own = [place for place in range(1, len(ids)) if mask[place]]
        assert [exported_row["value"][place] for place in own] == stored_row["value"]
        labels = {place: label for place, label in enumerate(exported_row["labels"]) if label >= 0}
        chosen = [place for place, mark in zip(own, stored_row["kept"], strict=True) if mark]
        assert labels == {place: ids[place] for place in chosen}
    exported(values, tmp_path, "axolotl", "axolotl.parquet")
    columns = pq.read_table(tmp_path / "axolotl.parquet").column_names
    assert columns == ["input_ids", "attention_mask", "labels"]
    exported(values, tmp_path, "llamafactory", "tokenised")
    loaded = datasets.load_from_disk(str(tmp_path / "tokenised"))["train"]
    assert loaded[0]["labels"] == rows[0]["labels"]
    assert set(loaded[0]["attention_mask"]) == {1}


@pytest.mark.parametrize(
    ("changes", "form", "message"),
    [
        ({}, "csv", "--format csv is not known; known: parquet, trl, axolotl, llamafactory"),
        ({"preference": {}}, "trl", "pairs have no labels in these formats"),
        ({}, "trl", r"values has no settings.json; make it with recipes/value_tokens.py"),
    ],
)
def test_what_cannot_be_exported_is_said(
    pair_values: dict[str, Any],
    run_values: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    form: str,
    message: str,
) -> None:
    values = pair_values if changes else run_values
    file = written(tmp_path / "run.yaml", values)
    command = ["values", "export", str(tmp_path / "rows"), "--config", str(file), "--format", form]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert re.search(message, str(result.exception))


def test_what_stops_an_export_is_said(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file of the store, or a full disk, is not hidden by what datasets makes of it."""
    store = value_rows(run_of(run_values))
    file = written(tmp_path / "run.yaml", run_values)
    command = ["values", "export", str(tmp_path / "rows"), "--config", str(file)]
    command.append(f"selection.store={store}")

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alphatoken.store.exporting._row", full)
        result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert re.search("cannot write .*rows: .*No space left", str(result.exception))
    damaged(store)
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert re.search("is damaged .*; remove it", str(result.exception))


@pytest.mark.slow
def test_trl_trains_on_exported_rows_as_we_do(run_values: dict[str, Any], tmp_path: Path) -> None:
    """Two steps of all rows at once: the second loss depends on the update as well."""
    values = changed(
        run_values,
        data={"train": [{"path": run_values["data"]["train"], "first": 6}]},
        selection={"scope": "sequence", "min_keep": 1},
        optim={"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0},
        train={"global_batch_size": 6, "micro_batch_size": 6},
    )
    values["valuation"]["validation_sequences"] = 5
    store = value_rows(run_of(values))
    exported(values, tmp_path, "trl", "rows.parquet")
    assert run_recipe(written(tmp_path / "ours.yaml", stored(values, store))).returncode == 0
    ours = [
        step["loss_kept"] for step in metrics_of(values["train"]["output_dir"]) if step["step"] > 0
    ]

    model = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    chosen = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=6,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(values["model"]["name_or_path"])
    trainer = SFTTrainer(model, chosen, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    theirs = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert ours[0] != pytest.approx(ours[1], rel=1e-2)
    assert ours == pytest.approx(theirs, rel=1e-5)
