"""On the quickstart's model, SmolLM2-135M-Instruct: bf16 against fp32, attention kernels, the
README's example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken import TokenValues, ValuationConfig, score_tokens
from alphatoken.training.moments import rank_correlation
from recipes.quickstart import get_model, make_data
from tests.ranks import ROOT

PARTS = {"train": slice(4), "validation": slice(4)}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The quickstart's model folder; downloaded where it is missing."""
    folder = ROOT / "models" / "smollm2"
    get_model.main(get_model.Model.smollm2, folder)
    return folder


def batch_of(model: Path, problems: list[make_data.Problem]) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for prompt, response in problems:
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        answered = tokenizer(response, add_special_tokens=False).input_ids
        rows.append((asked, answered))
    length = max(len(asked) + len(answered) for asked, answered in rows)
    batch = {
        key: torch.zeros(len(rows), length, dtype=torch.int64)
        for key in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.full((len(rows), length), -100)
    for row, (asked, answered) in enumerate(rows):
        end = len(asked) + len(answered)
        batch["input_ids"][row, :end] = torch.tensor(asked + answered)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, len(asked) : end] = torch.tensor(answered)
    return batch


def values_with(folder: Path, dtype: torch.dtype, attention: str) -> tuple[Tensor, TokenValues]:
    """The response mask at loss positions, and the values of four generated problems by four
    others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    problems = make_data.problems(seed=0)
    batch, validation = (batch_of(folder, problems[part][rows]) for part, rows in PARTS.items())
    response_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    response_BT[:, :-1] = batch["labels"][:, 1:] != -100
    return response_BT, score_tokens(model, batch, validation, config=ValuationConfig())


@pytest.mark.slow
def test_bf16_ranks_tokens_like_fp32(smollm2: Path) -> None:
    response_BT, exact = values_with(smollm2, torch.float32, "sdpa")
    _, coarse = values_with(smollm2, torch.bfloat16, "sdpa")
    assert rank_correlation(exact.composite[response_BT], coarse.composite[response_BT]) >= 0.99


@pytest.mark.slow
def test_sdpa_and_eager_give_the_same_values_on_a_real_model(smollm2: Path) -> None:
    response_BT, sdpa = values_with(smollm2, torch.float32, "sdpa")
    _, eager = values_with(smollm2, torch.float32, "eager")
    for name, value_BT in sdpa.items():
        other = getattr(eager, name)
        assert (value_BT - other)[response_BT].abs().max() <= 1e-4 * other.abs().max(), name


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_example_of_the_readme_prints_what_it_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n+(.*?)\n\S", readme, re.DOTALL)
    assert found is not None
    code, output = found.groups()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    promised = [line.split() for line in output.splitlines() if line.strip() != "..."]
    printed = [line.split() for line in run.stdout.splitlines()[: len(promised)]]
    assert len(promised) > 5
    for (value, *token), (actual, *actual_token) in zip(promised, printed, strict=True):
        assert token == actual_token
        assert float(value) == pytest.approx(float(actual), rel=0.05, abs=0.05)
