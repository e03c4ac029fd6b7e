"""Values that are made once and trained with later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.select import select
from alphatoken.training.feed import Feed
from alphatoken.training.refresh import held_out_refresh
from alphatoken.training.setup import Run, build_run
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


def test_a_store_gives_the_masks_of_scoring_while_training(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    run_values["valuation"] |= {"contrast": 1.0, "contrast_from": "drawn"}
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valuation": {"enabled": False}}, "valuation.enabled=false: there is nothing to value"),
        ({"valuation": {"start_step": 4}}, "valuation.start_step=4"),
        ({"selection": {"scope": "global_batch"}}, "selection.scope=global_batch chooses among"),
    ],
)
def test_what_cannot_be_valued_is_said_first(
    run_values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_valuing(RunConfig.model_validate(changed(run_values, **changes)))


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
