"""The flat recipe against the engine: the same rows, values, choices, losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from recipes import minimal
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of

STEPS = 4


@pytest.mark.slow
def test_the_minimal_recipe_equals_the_engine(run_values: dict[str, Any], tmp_path: Path) -> None:
    values = changed(
        run_values,
        train={"max_steps": STEPS},
        valuation={"stability_weight": 0.0},
        selection={"keep_ratio": 0.3},
    )
    assert run_ranks("run_trainers", 1, tmp_path / "ranks", configs={"engine": values}) == [
        {"engine": ""}
    ]
    model, losses = minimal.main(
        [
            f"--model={values['model']['name_or_path']}",
            f"--train={values['data']['train']}",
            f"--validation={values['data']['validation']}",
            f"--steps={STEPS}",
            f"--batch={values['train']['global_batch_size']}",
            f"--micro-batch={values['train']['micro_batch_size']}",
            f"--held-out={values['valuation']['validation_sequences']}",
            f"--layers={values['valuation']['layers']}",
            f"--window={values['valuation']['window']}",
            "--keep-ratio=0.3",
            f"--lr={values['optim']['lr']}",
        ]
    )
    folder = Path(values["train"]["output_dir"])
    assert losses == pytest.approx([step["loss_kept"] for step in metrics_of(folder)[1:]], rel=1e-5)
    start = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"]).state_dict()
    engine = AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
    moved = 0.0
    for name, weight in model.state_dict().items():
        error = float((weight.cpu() - engine[name]).abs().max())
        assert error <= 1e-6, f"{name} is off by {error:.1e}"
        moved = max(moved, float((engine[name] - start[name]).abs().max()))
    assert moved > 1e-3, "the weights must have moved for this to say anything"
