"""A tiny model folder and a tiny data set, built once per session. Tests are repeatable, and GPU
tests wait for a GPU.

`--hypothesis-profile=default` looks at new examples instead of the same ones each time.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from recipes.quickstart.get_model import save_tiny

# The tensors of tests are tiny: a second thread only waits, and takes a core from another
# process.
torch.set_num_threads(1)

# Launchers call python and deepspeed by name: those of this environment, also where it is not
# activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how a process ends: one that another test has made a rank would really end, and
    pytest's with it."""
    monkeypatch.setattr("alphatoken.distributed.process.running_comm", lambda: None)


# Files whose tests run in one process under `-n 2`: they share a fixture that takes long, a
# download or a cache, or start daemons on two machines.
ONE_PROCESS = (
    "tests/launch/",
    "tests/test_doctor.py",
    "tests/test_fisher.py",
    "tests/test_plan.py",
    "tests/test_real_model.py",
)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is none
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals out tests one by one, and those of `ONE_PROCESS` together.

    Marks with `xdist_group` would say this beside each test, but pytest-xdist 3.8 does not see them
    under pytest 9.2: it writes groups into an attribute that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((path for path in ONE_PROCESS if nodeid.startswith(path)), nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none, and puts first what takes longest: of two test
    processes none is left alone with a long test in the end."""
    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Takes all that was imported out of garbage collection, which DeepSpeed asks for in every
    engine it builds."""
    gc.collect()
    gc.freeze()


def place(item: pytest.Item) -> int:
    """Where a test comes: those that start processes, the other ones, those of all further
    architectures."""
    if item.get_closest_marker("exhaustive"):
        return 2
    return 0 if item.get_closest_marker("slow") else 1


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer Llama with a byte tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows of very different lengths, as `data.train`, `data.validation` and `data.eval`."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    files = {}
    for part, size in (("train", 30), ("validation", 7), ("eval", 5)):
        rows = []
        for index in range(size):
            words = [
                rng.choice(["red", "green", "blue", "seven", "eleven"])
                for _ in range(rng.randint(1, 9))
            ]
            rows.append({"prompt": f"{part} {index}?", "response": " ".join(words)})
        files[part] = str(folder / f"{part}.jsonl")
        Path(files[part]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return files


@pytest.fixture(scope="session")
def pair_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pairs of different lengths, as `data.train`, `data.validation` and `data.eval`; prompts of
    one or three turns."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(1)
    files = {}
    for part, size in (("train", 30), ("validation", 7), ("eval", 5)):
        rows = []
        for index in range(size):
            colours, numbers = (
                " ".join(rng.choice(words) for _ in range(rng.randint(1, 9)))
                for words in (["red", "green", "blue"], ["seven", "eleven"])
            )
            prompt: Any = f"{part} {index}?"
            if index % 3 == 0:
                earlier = [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yes?"},
                ]
                prompt = [*earlier, {"role": "user", "content": prompt}]
            rows.append({"prompt": prompt, "chosen": colours, "rejected": numbers})
        files[part] = str(folder / f"{part}.jsonl")
        Path(files[part]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return files


@pytest.fixture(scope="session")
def tiny_fisher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Fisher of the tiny model for tests that are about something else, which need not estimate
    one; random, of all its parameters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(3)
    fisher = {
        name: torch.rand(weight.shape, generator=generator)
        for name, weight in model.named_parameters()
    }
    file = tmp_path_factory.mktemp("fisher") / "fisher.safetensors"
    save_file(fisher, file)
    return file


@pytest.fixture
def stability(tiny_model: Path, tiny_fisher: Path, tmp_path: Path) -> dict[str, str]:
    """A random Fisher file and a reference a little away from the starting weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "reference")
    return {
        "fisher": str(tiny_fisher),
        "reference": str(tmp_path / "reference"),
    }


@pytest.fixture
def pair_values(run_values: dict[str, Any], pair_data: dict[str, str]) -> dict[str, Any]:
    """The same for preference optimization."""
    return {**run_values, "data": {**run_values["data"], **pair_data}, "preference": {}}


@pytest.fixture
def run_values(tiny_model: Path, tiny_data: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A valid configuration for a run of two steps; tests change what they are about."""
    return {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "data": {**tiny_data, "cache_dir": str(tmp_path / "cache")},
        "valuation": {"layers": 2, "validation_sequences": 5, "window": 4},
        "selection": {"keep_ratio": 0.5},  # as published
        "fisher": {"sampling": "teacher_forced", "num_prompts": 4, "batch_size": 2},
        "optim": {"lr": 1e-3},
        "train": {
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "max_steps": 2,
            "output_dir": str(tmp_path / "run"),
        },
    }
