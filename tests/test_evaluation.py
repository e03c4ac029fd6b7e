"""What a model can do, against one text at a time; intervals, pairs, and ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from alphatoken.batch import Batch
from alphatoken.cli import app
from alphatoken.config.evaluating import EvaluationRunConfig
from alphatoken.config.evaluation import EvaluationConfig
from alphatoken.config.file import validate
from alphatoken.data.cache import Document
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError
from alphatoken.evaluation.comparison import compare
from alphatoken.evaluation.evaluate import build_tasks, judged
from alphatoken.evaluation.judge import Judge
from alphatoken.evaluation.measures import MEASURES, measured
from alphatoken.evaluation.results import (
    Evaluation,
    TaskResult,
    read_evaluation,
    write_evaluation,
)
from alphatoken.evaluation.sandbox import Limits, check_sandbox
from alphatoken.evaluation.tasks import choices_of, last_number
from alphatoken.evaluation.tokens import windows
from alphatoken.models.decoder import decoder_of
from alphatoken.models.token_losses import TokenLosses
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.evaluation import evaluate
from alphatoken.util import resampling
from alphatoken.util.resampling import resampled_sums
from tests.ranks import run_ranks
from tests.runs import run_recipe
from tests.tiny import with_index

HELLASWAG: list[dict[str, Any]] = [
    {
        "ctx": "Cooking: He takes  a pan [step] and",
        "endings": ["red.", "a b c.", "sits"],
        "label": 1,
    },
    {
        "ctx": "Running: she",
        "endings": ["goes on and on and on", "no", "a [title] x"],
        "label": "0",
    },
    {"ctx": "Go: it", "endings": ["is", "was"], "label": 1},
]
ARC: list[dict[str, Any]] = [
    {"question": "Which one?", "choices": ["this", "that", "none"], "label": 2},
    {
        "question": "Why?",
        "choices": {"text": ["so", "because"], "label": ["A", "B"]},
        "answerKey": "B",
    },
]
TEXTS = [{"text": "A first text, which is long enough for two."}, {"text": "Ä!"}, {"text": ""}]
MATHS = [
    {"prompt": "1 + 1?", "response": "It is 2."},
    {"prompt": "What is 300 + 1,000?", "response": "#### 1,300"},
    {"prompt": "And 3?", "response": "3"},
]
PAIRS = [
    {"prompt": "Hello", "chosen": "Hi", "rejected": "What do you want?"},
    {"prompt": "Say it", "chosen": "It, and more of it", "rejected": "No"},
    {"prompt": "Same", "chosen": "x", "rejected": "x"},
]


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """One task of each kind that runs no programs."""
    maths = write(tmp_path, "maths", MATHS)
    return {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "data": {"cache_dir": str(tmp_path / "cache"), "eval": maths},
        "evaluation": {
            "batch_size": 2,
            "max_length": 96,
            "resamples": 50,
            "output": str(tmp_path / "evaluation.json"),
            "tasks": [
                {
                    "task": "multiple_choice",
                    "name": "hellaswag",
                    "data": write(tmp_path, "hellaswag", HELLASWAG),
                },
                {"task": "multiple_choice", "name": "arc", "data": write(tmp_path, "arc", ARC)},
                {"task": "perplexity", "data": write(tmp_path, "texts", TEXTS)},
                {"task": "exact_match", "max_new_tokens": 4},
                {"task": "preference_accuracy", "data": write(tmp_path, "pairs", PAIRS)},
                {"task": "target_loss"},
            ],
        },
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from recipes.quickstart.get_model import save_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # random weights say the same everywhere
        for weight in found.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    return found.eval()


def configured(values: dict[str, Any]) -> EvaluationRunConfig:
    return validate(EvaluationRunConfig, values, "of the test")


def judge_of(model: Any, config: EvaluationRunConfig) -> Judge:
    tokenizer = load_tokenizer(config.model)
    return Judge(
        model=model,
        token_losses=TokenLosses(decoder_of(model)),
        tokenizer=tokenizer,
        stop_tokens=[tokenizer.eos_token_id],
        device=torch.device("cpu"),
        batch_size=config.evaluation.batch_size,
    )


def evaluated(model: Any, values: dict[str, Any]) -> Evaluation:
    config = configured(values)
    tasks = build_tasks(config, load_tokenizer(config.model), config.evaluation.tasks)
    return judged(config, tasks, judge_of(model, config), "tiny")


def naive_loss(model: Any, ids: list[int], first: int) -> float:
    """The summed loss of the tokens from `first` on, of one text alone."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    losses_T = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
    return float(losses_T[first - 1 :].sum())


def test_choices_are_those_of_one_text_at_a_time(model: Any, values: dict[str, Any]) -> None:
    """Contexts are cleaned as lm-eval's, a space separates, and characters normalise."""
    tokenizer = load_tokenizer(configured(values).model)
    found = evaluated(model, values).tasks["hellaswag"].items
    contexts = ["Cooking: He takes a pan and", "Running: she", "Go: it"]
    endings = [["red.", "a b c.", "sits"], ["goes on and on and on", "no", "a. x"], ["is", "was"]]
    for item, context, own, right in zip(found, contexts, endings, (1, 0, 1), strict=True):
        start = len(tokenizer(context)["input_ids"])
        losses = [
            naive_loss(model, tokenizer(f"{context} {ending}")["input_ids"], start)
            for ending in own
        ]
        assert item["nll"] == pytest.approx(losses, rel=1e-5)
        per_character = [loss / len(text) for loss, text in zip(losses, own, strict=True)]
        assert item["acc"] == float(np.argmin(losses) == right)
        assert item["acc_norm"] == float(np.argmin(per_character) == right)


def test_arc_is_read_as_published_and_with_labels() -> None:
    plain, published = (choices_of(row, "here") for row in ARC)
    assert plain.context == "Question: Which one?\nAnswer:"
    assert (plain.continuations, plain.right) == (("this", "that", "none"), 2)
    assert (published.continuations, published.right) == (("so", "because"), 1)
    hellaswag = {
        "ctx_a": "He is.",
        "ctx_b": "then he",
        "activity_label": "Go",
        "endings": ["a", "b"],
    }
    assert choices_of({**hellaswag, "label": "1"}, "here").context == "Go: He is. Then he"


def test_perplexity_counts_every_token_and_byte_once(model: Any, values: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(configured(values).model)
    values["evaluation"]["max_length"] = 16  # the longer text is read in parts
    tasks = values["evaluation"]["tasks"]
    values["evaluation"]["tasks"] = [each for each in tasks if each["task"] == "perplexity"]
    result = evaluated(model, values).tasks["perplexity"]
    assert [item["tokens"] for item in result.items] == [
        len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) for row in TEXTS[:2]
    ]
    assert [item["bytes"] for item in result.items] == [43, 3]
    first = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if first is None else first
    ids = [prefix, *tokenizer(TEXTS[1]["text"], add_special_tokens=False)["input_ids"]]
    assert result.items[1]["nll"] == pytest.approx(naive_loss(model, ids, 1), rel=1e-5)
    total, tokens = (sum(item[key] for item in result.items) for key in ("nll", "tokens"))
    found = result.measured(10, 0)
    assert found["perplexity"].value == pytest.approx(math.exp(total / tokens))
    assert found["byte_perplexity"].value == pytest.approx(math.exp(total / 46))


@pytest.mark.parametrize("length", [2, 5, 6, 7, 11, 12])
def test_windows_predict_each_token_once_from_as_much_as_fits(length: int) -> None:
    ids = list(range(100, 100 + length))
    predicted = []
    for document_ids, mask in windows(ids, 6):
        assert len(document_ids) <= 6
        assert not mask[0]
        predicted += document_ids[mask].tolist()
    assert predicted == ids[1:]
    last_ids, last_mask = windows(ids, 6)[-1]
    assert len(last_ids) == min(6, length)
    assert last_mask[-1]


def test_answers_are_those_of_generate(model: Any, values: dict[str, Any]) -> None:
    config = configured(values)
    tokenizer = load_tokenizer(config.model)
    items = evaluated(model, values).tasks["exact_match"].items
    for item, row in zip(items, MATHS, strict=True):
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **ids, do_sample=False, max_new_tokens=4, eos_token_id=tokenizer.eos_token_id
        )
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert item["answer"] == answer
    assert len({item["answer"] for item in items}) > 1


class Told(Judge):
    """A judge that gives the same answers and losses to everything."""

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        return ["It is 2", "thus 1300.0", "two"]

    def losses(self, documents: Sequence[Document], places: Sequence[str]) -> list[float]:
        return [float(number) for number, _ in enumerate(documents)]


def told(model: Any, values: dict[str, Any], kind: type[Judge] = Told) -> Evaluation:
    config = configured(values)
    judge = judge_of(model, config)
    known = {each.name: getattr(judge, each.name) for each in dataclasses.fields(judge)}
    tasks = build_tasks(config, load_tokenizer(config.model), config.evaluation.tasks)
    return judged(config, tasks, kind(**known), "tiny")


def test_exact_match_compares_numbers_or_texts(model: Any, values: dict[str, Any]) -> None:
    (task,) = (each for each in values["evaluation"]["tasks"] if each["task"] == "exact_match")
    items = told(model, values).tasks["exact_match"].items
    assert [item["exact_match"] for item in items] == [1, 1, 0]
    task["match"] = "text"
    items = told(model, values).tasks["exact_match"].items
    assert [item["exact_match"] for item in items] == [0, 0, 0]


def test_of_a_pair_the_likelier_answer_counts_as_a_whole_and_per_token(
    model: Any, values: dict[str, Any]
) -> None:
    """The chosen answers have the losses 0 and 2, the rejected ones 1 and 3."""
    items = told(model, values).tasks["preference_accuracy"].items
    assert [item["nll"] for item in items] == [
        [0, 1],
        [2, 3],
    ]  # the pair without a difference is out
    assert [item["accuracy"] for item in items] == [1, 1]
    for item in items:
        (chosen, rejected), (few, many) = item["nll"], item["tokens"]
        assert item["accuracy_norm"] == float(chosen / few < rejected / many)


def test_the_target_loss_is_that_of_responses(model: Any, values: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(configured(values).model)
    items = evaluated(model, values).tasks["target_loss"].items
    for item, row in zip(items, MATHS, strict=True):
        user = [{"role": "user", "content": row["prompt"]}]
        start = len(tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"])
        whole = [*user, {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(whole)["input_ids"]
        ids = ids[: start + item["tokens"]]
        assert ids[-1] == tokenizer.eos_token_id
        assert item["nll"] == pytest.approx(naive_loss(model, ids, start), rel=1e-5)


def test_the_last_number_of_a_text() -> None:
    assert [last_number(text) for text in ("1 and -2,000.5.", "no", "a 7, b")] == [-2000.5, None, 7]


TASK = {"task": "multiple_choice", "data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"a": 1}, {}, "rows.jsonl:1: multiple_choice reads rows with 'ctx'.*this one has a"),
        ({"ctx": "x", "endings": ["a"], "label": 0}, {}, "'endings' must be a list of at least 2"),
        ({"ctx": "x", "endings": ["a", "b"], "label": 2}, {}, "number of the right one of 2.*is 2"),
        ({"endings": ["a", "b"], "label": 0}, {}, "rows with 'endings' need 'ctx'"),
        (
            {"question": 1, "choices": ["a", "b"], "label": 0},
            {},
            "'question' must be text, but is 1",
        ),
        ({"ctx": " ", "endings": ["a", "b"], "label": 0}, {}, "is no token of its own"),
        (
            {"ctx": "x", "endings": ["[a]", "b"], "label": 0},
            {},
            r"nothing is left of the ending '\[a\]'",
        ),
        (
            {"question": "x", "choices": {"text": ["a", "b"], "label": None}, "answerKey": "A"},
            {},
            "'answerKey' must be one of the 2 names in 'choices.label', but is 'A'.*None",
        ),
        (
            {"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
            | {"answerKey": "1"},
            {},
            r"'answerKey' must be one of the 2 names .* but is '1' and these are \['A', 'B'\]",
        ),
        ({"ctx": "x", "endings": ["a", "\ud800"], "label": 0}, {}, "half of a character"),
        ({"text": "\ud800"}, {"task": "perplexity"}, "text has half of a character"),
        ({"text": 1}, {"task": "perplexity"}, "'text' must be text, but is 1"),
        ({"txt": "x"}, {"task": "perplexity"}, "'text' must be text, but the row has txt"),
        ({"text": ""}, {"task": "perplexity"}, "perplexity has no usable row .1 skipped: empty"),
        ({"prompt": "x", "response": "y"}, {"task": "exact_match"}, "reference has no number"),
        (
            {"messages": [{"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}]},
            {"task": "exact_match"},
            "does not end with an answer",
        ),
        ({"text": "x"}, {"task": "perplexity", "data": None}, "has no rows: give it data, as in"),
        (
            {"prompt": "x", "response": "1"},
            {"task": "exact_match", "max_new_tokens": 10**6},
            "1000000 of them to be generated, but .* positions: lower max_new_tokens of the task",
        ),
        (
            {"prompt": "x", "response": "long " * 300},
            {"task": "target_loss"},
            "positions: lower data.max_length to fit into 1024",
        ),
    ],
)
def test_rows_that_cannot_be_asked(
    row: dict[str, Any], task: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    values["evaluation"]["tasks"] = [{**TASK, "data": write(tmp_path, "rows", [row]), **task}]
    config = configured(values)
    with pytest.raises(UserError, match=message):
        build_tasks(config, load_tokenizer(config.model), config.evaluation.tasks)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "hellaswag"}], "evaluation.tasks.0.task: input should be 'target_loss'"),
        ([TASK, TASK], "2 tasks of evaluation.tasks are called 'multiple_choice'"),
        ([{"task": "humaneval"}], "runs programs that the model writes and nobody has read"),
        ([{**TASK, "name": "a b"}], "evaluation.tasks.0.name: string should match"),
        ([{**TASK, "data": {"path": "x", "weight": 2.0}}], "weight=2, but every row is asked once"),
        (
            [{**TASK, "data": {"path": "x", "format": "alpaca"}}],
            "format=alpaca, but multiple_choice",
        ),
    ],
)
def test_tasks_that_are_refused(
    tasks: list[dict[str, Any]], message: str, values: dict[str, Any]
) -> None:
    values["evaluation"]["tasks"] = tasks
    with pytest.raises(UserError, match=message):
        configured(values)


def test_a_loss_that_is_not_finite_is_refused(model: Any, values: dict[str, Any]) -> None:
    broken = judge_of(model, configured(values))
    nothing = dataclasses.replace(
        broken,
        token_losses=lambda batch: torch.full_like(batch["labels"], torch.nan, dtype=torch.float32),
    )
    with pytest.raises(UserError, match=r"the loss of item 0 is not finite; try model.dtype"):
        nothing.losses([windows([1, 2, 3], 8)[0]], ["item 0"])


def shares(values: Sequence[float], ids: str = "x") -> TaskResult:
    items = [
        {"row": f"f:{place}", "id": f"{ids}{place}", "exact_match": value}
        for place, value in enumerate(values)
    ]
    return TaskResult("exact_match", "target", {"match": "number"}, items)


def losses(
    values: Sequence[float], task: str = "perplexity", part: Any = "retention", longer: int = 0
) -> TaskResult:
    """Items of 1, 2, ... tokens, and so many more."""
    items = [
        {
            **{"row": f"f:{place}", "id": str(place), "nll": value, "bytes": 9},
            **{"tokens": 1 + place + longer, "accuracy": 1.0, "accuracy_norm": 1.0},
        }
        for place, value in enumerate(values)
    ]
    return TaskResult(task, part, {}, items)


def test_intervals_hold_the_value_as_often_as_they_say() -> None:
    """Of 200 samples of a share of 0.3, about 95 % have an interval that it is in."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        drawn = shares((rng.random(80) < 0.3).astype(float).tolist())
        found = measured("exact_match", drawn.items, 300, seed)["exact_match"]
        held += found.low <= 0.3 <= found.high
        assert found.low <= found.value <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_resamples_are_as_large_as_the_sample_and_ratios_are_of_sums() -> None:
    counts = resampled_sums(np.eye(7), 20, 0)
    assert counts.sum(1).tolist() == [7] * 20
    perplexity, _ = MEASURES["perplexity"]
    assert perplexity.value(losses([1.0, 5.0]).items) == pytest.approx(math.exp(6 / 3))


def test_resamples_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many items are not held in all resamples at once."""
    values = np.random.default_rng(0).random((9, 2))
    whole = resampled_sums(values, 20, 3)
    for draws in (1, 30):
        monkeypatch.setattr(resampling, "DRAWS", draws)
        np.testing.assert_allclose(resampled_sums(values, 20, 3), whole, rtol=1e-14)


SETTINGS = EvaluationConfig(resamples=200)


def test_pairs_are_compared_item_by_item() -> None:
    """An item that is hard for both does not widen the interval, and better is more, whatever the
    measure."""
    hard = [0.0, 1.0] * 20
    before = Evaluation("a", {"gsm8k": shares(hard), "text": losses([3.0, 4.0, 8.0])})
    after = Evaluation("b", {"gsm8k": shares(hard), "text": losses([2.0, 3.0, 6.0])})
    found = compare(before, after, SETTINGS)
    same, perplexity, _ = found.differences
    assert (same.difference.value, same.difference.low, same.difference.high) == (0, 0, 0)
    assert perplexity.difference.value < 0 < perplexity.improvement
    sentence = found.sentence()
    assert sentence.startswith("target +0.0000 [+0.0000, +0.0000] (gsm8k exact_match), retention +")
    better = Evaluation("c", {"gsm8k": shares([1.0] * 40)})
    (gained,) = compare(before, better, SETTINGS).differences
    assert gained.difference.value == 0.5
    assert 0.3 < gained.difference.low < 0.5 < gained.difference.high < 0.7


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"other": shares([1.0])}, "no task in common: gsm8k, answers, pairs of a, other of b"),
        ({"gsm8k": losses([1.0, 2.0])}, "task gsm8k is exact_match before and perplexity after"),
        (
            {"gsm8k": dataclasses.replace(shares([1.0, 0.0]), settings={"match": "text"})},
            "gsm8k: match was 'number' before and is 'text' after",
        ),
        ({"gsm8k": shares([1.0, 0.0], "y")}, "item 1 is f:0 before and f:0 after, with other"),
        ({"gsm8k": shares([1.0])}, "cannot be paired: 2 items before and 1 after"),
        (
            {"answers": losses([3.0, 4.0], task="target_loss", longer=1)},
            "task answers: f:0 has 1 response tokens before and 2 after",
        ),
        (
            {"pairs": losses([3.0, 4.0], task="preference_accuracy", longer=1)},
            "task pairs: f:0 has 1 response tokens before and 2 after",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(after: dict[str, TaskResult], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(
            Evaluation(
                "a",
                {
                    "gsm8k": shares([1.0, 0.0]),
                    "answers": losses([3.0, 4.0], task="target_loss"),
                    "pairs": losses([3.0, 4.0], task="preference_accuracy"),
                },
            ),
            Evaluation("b", after),
            SETTINGS,
        )


def test_texts_of_other_tokens_are_compared_by_their_bytes() -> None:
    before, after = (
        Evaluation(name, {"text": losses([3.0, 4.0], longer=longer)})
        for name, longer in (("a", 0), ("b", 1))
    )
    (found,) = compare(before, after, SETTINGS).differences
    assert found.measure.name == "byte_perplexity"


def test_the_last_sentence_counts_one_unit() -> None:
    """Nats are not added to perplexities."""
    before, after = (
        Evaluation(
            name,
            {
                "text": losses([loss, 4.0]),
                "old": losses([loss, 9.0], task="target_loss", part="retention"),
            },
        )
        for name, loss in (("a", 3.0), ("b", 2.0))
    )
    assert compare(before, after, SETTINGS).sentence().endswith("] (text perplexity)")


def test_the_command_compares_two_files_and_ends_with_a_sentence(tmp_path: Path) -> None:
    files = []
    for name, right in (("a", 10), ("b", 25)):
        result = shares([float(place < right) for place in range(40)])
        files.append(tmp_path / f"{name}.json")
        evaluation = Evaluation(name, {"gsm8k": result})
        write_evaluation(files[-1], evaluation, SETTINGS)
        assert read_evaluation(files[-1]) == evaluation
    done = CliRunner().invoke(app, ["compare", *map(str, files)])
    last = done.stdout.splitlines()[-1]
    assert last.startswith("target +0.3750 [+0.")
    assert last.endswith("] (gsm8k exact_match)")
    for damaged, message in (
        ("{}", "is not an evaluation that this version reads"),
        ('{"format_version": 1, "tasks": {"a": {}}}', r"is damaged \(KeyError: 'task'\)"),
        ('{"format_version": 1, "tasks": []}', "is damaged .AttributeError"),
        ('{"format_version": 1, "tasks": {}}', r"is damaged \(KeyError: 'model'\)"),
    ):
        files[0].write_text(damaged)
        with pytest.raises(UserError, match=message):
            read_evaluation(files[0])


@pytest.mark.slow
def test_the_recipe_compares_with_an_earlier_evaluation(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """The last line says so; other rows are refused before weights are read."""
    values["evaluation"]["tasks"] = [
        each
        for each in values["evaluation"]["tasks"]
        if each["task"] in {"perplexity", "target_loss"}
    ]
    file = tmp_path / "evaluate.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    earlier = values["evaluation"]["output"]
    first = run_recipe(file, recipe="evaluate")
    assert first.returncode == 0, first.stderr
    assert "evaluation task perplexity: 1 skipped: empty text" in first.stdout
    assert first.stdout.splitlines()[-1] == earlier
    over = run_recipe(file, recipe="evaluate")
    assert over.returncode == 2
    assert f"{earlier} exists; name another file" in over.stderr
    nowhere = run_recipe(file, "evaluation.output=/proc/nowhere/a.json", recipe="evaluate")
    assert nowhere.returncode == 2
    assert "cannot write the evaluation /proc/nowhere/a.json" in nowhere.stderr
    assert "batches" not in nowhere.stdout
    again = [f"evaluation.output={tmp_path}/again.json", f"evaluation.compare_with={earlier}"]
    second = run_recipe(file, *again, recipe="evaluate")
    assert second.stdout.splitlines()[-1] == (
        "target +0.0000 [+0.0000, +0.0000] (target_loss loss), "
        "retention +0.0000 [+0.0000, +0.0000] (perplexity perplexity)"
    ), second.stderr
    write(tmp_path, "texts", TEXTS[1:])
    again[0] = f"evaluation.output={tmp_path}/third.json"
    third = run_recipe(file, *again, recipe="evaluate")
    assert third.returncode == 2
    assert "task perplexity has other items in the two evaluations" in third.stderr
    assert "batches" not in third.stdout


@pytest.mark.slow
def test_ranks_equal_one_process_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    """With three items in batches of two, and of ten texts an unequal share each."""
    found = {}
    for ranks in (1, 2):
        values["evaluation"]["output"] = str(tmp_path / f"{ranks}.json")
        run_ranks("evaluate", ranks, tmp_path / str(ranks), values=values)
        found[ranks] = json.loads((tmp_path / f"{ranks}.json").read_text(encoding="utf-8"))
    assert found[2] == found[1]
    assert set(found[1]["tasks"]) == {
        *("hellaswag", "arc", "perplexity", "exact_match", "preference_accuracy", "target_loss")
    }


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(x):\n    """Twice x."""\n',
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {"text": "Write twice.", "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"]}


class Coder(Judge):
    """A judge that writes these programs."""

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        if b"BEGIN" in bytes(self.tokenizer.decode(prompts[0]), "utf-8"):
            return ["def twice(x):\n    return 2 * x\n[DONE]\nsyntax error", "exit(0)"]
        return ["    return x + x\n\ndef check(x):\n    pass", "    return x\n"]


def test_programs_are_cut_and_run(model: Any, values: dict[str, Any], tmp_path: Path) -> None:
    """The right one passes and the wrong one does not, nor one that redefines its test or ends
    before it."""
    limits = Limits(seconds=5.0, megabytes=512)
    try:
        check_sandbox(limits)
    except UserError as error:
        pytest.skip(str(error))
    values["evaluation"] |= {
        "allow_code_execution": True,
        "code_seconds": 5.0,
        "code_megabytes": 512,
        "max_length": 512,
        "tasks": [
            {"task": "humaneval", "data": write(tmp_path, "humaneval", [HUMANEVAL, HUMANEVAL])},
            {"task": "mbpp", "data": write(tmp_path, "mbpp", [MBPP, MBPP])},
        ],
    }
    evaluation = told(model, values, Coder)
    for name in ("humaneval", "mbpp"):
        assert [item["pass_at_1"] for item in evaluation.tasks[name].items] == [1, 0]
    assert evaluation.tasks["humaneval"].items[0]["answer"] == "    return x + x\n"


def test_all_ranks_meet_before_batches_and_not_before_programs(
    model: Any, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank runs a share of the programs, and shares may differ."""
    for name in ("check_sandbox", "run_program"):
        monkeypatch.setattr(f"alphatoken.evaluation.code.{name}", lambda *_: True)
    values["evaluation"] |= {"allow_code_execution": True, "max_length": 512}
    humaneval = {"task": "humaneval", "data": write(tmp_path, "humaneval", [HUMANEVAL] * 3)}
    values["evaluation"]["tasks"] = [{**humaneval, "max_new_tokens": 2}]
    config, calls = configured(values), list[str]()
    judge = dataclasses.replace(
        judge_of(model, config),
        on_batch=lambda: calls.append("batch"),
        on_program=lambda: calls.append("program"),
    )
    tasks = build_tasks(config, load_tokenizer(config.model), config.evaluation.tasks)
    judged(config, tasks, judge, "tiny")
    assert calls == ["batch"] * 2 + ["batch"] + ["program"] * 3


def test_held_out_rows_are_evaluated_without_dropout() -> None:
    class Model(torch.nn.Module):
        """Its losses are ones, and twos in training."""

        def token_losses(self, batch: Batch) -> torch.Tensor:
            return batch["response"].float() * (1 + self.training)

    model = Model()
    batch = with_index({"response": torch.ones(1, 3, dtype=torch.bool)})
    found = evaluate(
        model=cast("Any", model),
        objective=SupervisedObjective(),
        batches=[batch],
        device=torch.device("cpu"),
        on_batch=lambda: None,
    )
    assert found == {"eval_loss": 1.0}
    assert model.training
