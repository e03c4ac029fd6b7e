"""The shipped configurations of UltraChat, Magicoder and UltraFeedback read what is published, and
run from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value

from recipes.quickstart.get_model import byte_tokenizer
from tests.ranks import ROOT
from tests.runs import metrics_of, run_recipe
from tests.tiny import CASES

SCALE = 32
"""Rows that a source skips or takes, for one of ours: 1512, 512 and 1000 become 47, 16 and 31."""
ROWS = 60
"""Of each split."""

TEXT, NUMBER = Value("string"), Value("int64")
MESSAGES = List({"content": TEXT, "role": TEXT})


def conversation(number: int, split: str, turns: int, last: str) -> list[dict[str, str]]:
    """So many questions with their answers, with the keys in the published order."""
    texts = [
        text
        for turn in range(turns)
        for text in (f"{split} {number}, question {turn}?", f"Answer {turn}.")
    ]
    texts[-1] = last
    return [
        {"content": text, "role": ("user", "assistant")[place % 2]}
        for place, text in enumerate(texts)
    ]


def ultrachat(number: int, split: str) -> dict[str, Any]:
    messages = conversation(number, split, 1 + number % 3, "The last answer.")
    return {
        "prompt": messages[0]["content"],
        "prompt_id": f"{number:064x}",
        "messages": messages,
    }


def magicoder(number: int, split: str) -> dict[str, Any]:
    return {
        "lang": "python",
        "raw_index": 3 * number,
        "index": number,
        "seed": "    return x\n",
        "openai_fingerprint": "fp_eeff13170a",
        "problem": f"Write a function that returns {number}.",
        "solution": f"```python\ndef solve():\n    return {number}\n```",
    }


def ultrafeedback(number: int, split: str) -> dict[str, Any]:
    """As published, `messages` are those of the chosen answer."""
    chosen, rejected = (
        conversation(number, split, 1, last) for last in ("Yes, of course.", "No idea, ask them.")
    )
    return {
        "prompt": chosen[0]["content"],
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }


PUBLISHED: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "HuggingFaceH4/ultrachat_200k": (
        ultrachat,
        ["train_sft", "test_sft", "train_gen", "test_gen"],
        {"prompt": TEXT, "prompt_id": TEXT, "messages": MESSAGES},
    ),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": (
        magicoder,
        ["train"],
        {
            "lang": TEXT,
            "raw_index": NUMBER,
            "index": NUMBER,
            "seed": TEXT,
            "openai_fingerprint": TEXT,
            "problem": TEXT,
            "solution": TEXT,
        },
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        ultrafeedback,
        ["train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"],
        {
            "prompt": TEXT,
            "prompt_id": TEXT,
            "chosen": MESSAGES,
            "rejected": MESSAGES,
            "messages": MESSAGES,
            "score_chosen": Value("float64"),
            "score_rejected": Value("float64"),
        },
    ),
}
"""A row, the splits and the columns of each dataset, as its page on the hub describes it."""

MODELS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "google/gemma-3-4b-pt": (
        "gemma3_multimodal",
        {"bos": "<bos>", "eos": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "meta-llama/Llama-3.2-3B": (
        "llama",
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "Qwen/Qwen3.5-9B": (
        "qwen3_5",
        {"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        ["<|im_start|>"],
    ),
}
"""The class of each model in `tests.tiny`, and its tokenizer's special tokens."""

SFT = sorted((ROOT / "configs" / "sft").glob("*ultrachat*.yaml"))
MAGICODER = sorted((ROOT / "configs" / "sft").glob("*magicoder*.yaml"))
PAIRS = sorted((ROOT / "configs" / "preference").glob("*ultrafeedback*.yaml"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of datasets with the published splits and columns, by the name on the hub."""
    folders = {}
    for name, (row, splits, columns) in PUBLISHED.items():
        folders[name] = str(tmp_path_factory.mktemp("published"))
        parts = {
            split: Dataset.from_list(
                [row(number, split) for number in range(ROWS)], features=Features(columns)
            )
            for split in splits
        }
        DatasetDict(parts).save_to_disk(folders[name])
    return folders


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models with their tokenizers, by the name on the hub."""
    folders = {}
    for name, (case, ends, others) in MODELS.items():
        folder = tmp_path_factory.mktemp("models")
        tokenizer = byte_tokenizer([*ends.values(), *others], **ends)
        model = CASES[case].build()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def from_yaml(file: Path) -> dict[str, Any]:
    """The values of a configuration."""
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    return values


def scaled(
    file: Path, published: dict[str, str], models: dict[str, str], folder: Path
) -> dict[str, Any]:
    """The values of a shipped configuration with local rows and models and fewer of everything; no
    other key of its data is changed."""
    values = from_yaml(file)
    sources = [values["data"][part] for part in ("train", "validation", "eval")]
    for source in (*sources, values["fisher"]["prompts"]):
        source["path"] = published[source["path"]]
        for key in source.keys() & {"skip", "first"}:
            source[key] //= SCALE
    model = values["model"]
    model["name_or_path"] = models.get(model["name_or_path"], model["name_or_path"])
    values["data"]["cache_dir"] = str(folder / "cache")
    values["valuation"]["validation_sequences"] = 4
    values["fisher"] |= {"num_prompts": 4, "max_new_tokens": 4}
    values["train"] |= {
        "global_batch_size": 4,
        "max_steps": 1,
        "eval_every": 1,
        "output_dir": str(folder / values["train"]["output_dir"]),
    }
    return values


def run(values: dict[str, Any], recipe: str, folder: Path) -> str:
    """Runs a recipe to its end. Returns what it prints."""
    file = folder / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(values))
    finished = run_recipe(file, recipe=recipe)
    assert finished.returncode == 0, finished.stderr[-3000:]
    _, step = metrics_of(values["train"]["output_dir"])
    assert step["response_tokens"] > step["kept_tokens"] > 0
    assert step["eval_loss"] > 0
    return finished.stdout


def test_every_warm_start_has_pairs_that_start_from_it() -> None:
    """Otherwise it is not run below."""
    exports = {f"{from_yaml(file)['train']['output_dir']}/export" for file in SFT}
    assert exports == {from_yaml(file)["model"]["name_or_path"] for file in PAIRS}
    assert len(exports) == len(SFT) == 3


@pytest.mark.slow
@pytest.mark.parametrize("file", PAIRS, ids=lambda file: file.stem)
def test_ultrachat_and_then_ultrafeedback_run(
    file: Path, published: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    """Pairs start from what the warm start exports."""
    pairs = scaled(file, published, models, tmp_path)
    start = Path(pairs["model"]["name_or_path"])
    (warm,) = (each for each in SFT if from_yaml(each)["train"]["output_dir"] == str(start.parent))
    said = run(scaled(warm, published, models, tmp_path), "sft", tmp_path)
    assert "columns not read: prompt, prompt_id" in said
    pairs["model"]["name_or_path"] = str(tmp_path / start)
    said = run(pairs, "preference", tmp_path)
    assert "columns not read: prompt_id, score_chosen, score_rejected" in said


@pytest.mark.slow
@pytest.mark.parametrize("file", MAGICODER, ids=lambda file: file.stem)
def test_magicoder_runs(
    file: Path, published: dict[str, str], models: dict[str, str], tmp_path: Path
) -> None:
    said = run(scaled(file, published, models, tmp_path), "sft", tmp_path)
    assert "columns not read: index, lang, openai_fingerprint, raw_index, seed" in said
