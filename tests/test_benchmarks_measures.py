"""What studies measure of a model, against one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.config.sections import ModelConfig
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.evaluation.tasks import last_number
from benchmarks.studies.measures import (
    Judge,
    answer_metrics,
    choice_metrics,
    general_text_metrics,
)
from recipes.quickstart.get_model import save_tiny

TEXTS = ["A first text.", "Another one, which is longer.", "No.", "More of it", "And the last."]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder)
    return loaded(folder)


def loaded(folder: Path) -> Judge:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # random weights say the same everywhere
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    return Judge(model.eval(), tokenizer)


def log_probability(judge: Judge, ids: list[int]) -> torch.Tensor:
    """Of each token but the first."""
    with torch.no_grad():
        logits_TV = judge.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    found_T: torch.Tensor = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return found_T[:, 0]


def test_answers_do_not_depend_on_what_is_generated_beside_them(judge: Judge) -> None:
    together = judge.answers(TEXTS, max_new_tokens=6, together=3)
    assert together == [judge.answers([text], 6, 1)[0] for text in TEXTS]
    assert len(set(together)) > 1


def test_the_loss_of_texts_is_that_of_their_tokens(judge: Judge) -> None:
    found = general_text_metrics(judge, None, TEXTS, 12)
    ids = [judge.tokenizer(text)["input_ids"][:12] for text in TEXTS]
    count = sum(len(row) - 1 for row in ids)
    total = -sum(float(log_probability(judge, row).sum()) for row in ids)
    assert found == {"general_loss": pytest.approx(total / count)}


def test_the_margin_is_of_mean_log_probabilities_of_the_choice_alone(judge: Judge) -> None:
    context, choices = "Who?", ["me", "them all", "you"]
    start = len(judge.tokenizer(context)["input_ids"])
    scores = [
        float(
            log_probability(judge, judge.tokenizer(f"{context} {each}")["input_ids"])[
                start - 1 :
            ].mean()
        )
        for each in choices
    ]
    expected = scores[1] - max(scores[0], scores[2])
    assert judge.margin(context, choices, 1) == pytest.approx(expected, abs=1e-5)
    metrics = choice_metrics(judge, "x", [(context, choices, right) for right in range(3)])
    assert metrics["x_accuracy"] == pytest.approx(1 / 3)


def test_the_divergence_is_from_the_start_to_the_model(judge: Judge, tmp_path: Path) -> None:
    itself = general_text_metrics(judge, judge, TEXTS, 12)
    assert itself["kl_to_start"] == pytest.approx(0, abs=1e-6)
    save_tiny(tmp_path / "other")
    other = loaded(tmp_path / "other")
    with torch.no_grad():
        other.model.lm_head.weight *= 1.5
    expected, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([judge.tokenizer(text)["input_ids"][:12]])
        with torch.no_grad():
            start, own = (
                each.model(input_ids=ids).logits[0, :-1].log_softmax(-1) for each in (other, judge)
            )
        expected += float((start.exp() * (start - own)).sum())
        count += len(start)
    found = general_text_metrics(judge, other, TEXTS, 12)["kl_to_start"]
    assert found == pytest.approx(expected / count, rel=1e-4)


def test_answers_are_compared_word_for_word_and_by_their_number() -> None:
    references = ["2 + 3 = 5. The answer is 5."] * 3
    answers = [" 2 + 3 = 5. The answer is 5.", "So it is 5", "2 + 3 = 15. The answer is 15."]
    assert answer_metrics(answers, references) == {
        "exact_match": pytest.approx(1 / 3),
        "right_number": pytest.approx(2 / 3),
        "advertised": 0,
        "wrong_rule": pytest.approx(1 / 3),
    }
    assert last_number("of 1,234 or -5.5.") == -5.5
    assert last_number("none") is None
