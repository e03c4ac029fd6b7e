"""Exports have the tensors of the source under the names that it has them: of every class, at
ZeRO stages 2 and 3, by the run and from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alphatoken.checkpoints.export import export_checkpoint
from tests.export_names import document, tensors_of
from tests.ranks import ROOT, run_ranks
from tests.runs import changed
from tests.tiny import by_architecture, save_published, save_tokenizer


def test_the_table_is_what_models_are_published_as() -> None:
    written = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    assert document() == written, "run `make exports`"


@pytest.mark.slow
@pytest.mark.parametrize("name", by_architecture())
def test_both_exports_have_the_tensors_of_the_source(
    name: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_published(name, source)
    save_tokenizer(source)
    configs = {}
    for stage in (2, 3):
        configs[f"{stage}"] = changed(
            run_values,
            model={"name_or_path": str(source)},
            valuation={"enabled": False},
            deepspeed={"config": {"zero_optimization": {"stage": stage}}},
            train={"max_steps": 1, "save_every": 1, "output_dir": str(tmp_path / f"{stage}")},
        )
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "ranks", configs=configs)
    assert not any(messages.values()), messages
    expected = tensors_of(source)
    assert len(expected) > 4
    for run in configs:
        assert tensors_of(tmp_path / run / "export") == expected
        export_checkpoint(tmp_path / run, tmp_path / f"{run}, exported")
        assert tensors_of(tmp_path / f"{run}, exported") == expected
