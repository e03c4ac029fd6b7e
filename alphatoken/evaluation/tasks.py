"""What a model is asked: losses of texts, choices, and generated answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.config.evaluation import EvaluationTask
from alphatoken.data.cache import Document
from alphatoken.data.chat import Encoder, PromptEncoder
from alphatoken.data.pairs import PairEncoder
from alphatoken.data.rows import as_chat, checked_text, is_tokenised
from alphatoken.data.tokenizer import chat_rules
from alphatoken.errors import UserError
from alphatoken.evaluation.code import Programs
from alphatoken.evaluation.judge import Judge, document
from alphatoken.evaluation.measures import Item
from alphatoken.evaluation.rows import (
    Questions,
    Setting,
    Task,
    encoded_rows,
    marked,
    pair_lengths,
    raw_rows,
    text_of,
)
from alphatoken.evaluation.tokens import continued, windows

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


def last_number(text: str) -> float | None:
    """The last number of a text, thousands' commas or not; None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class TargetLoss(Task):
    """The loss of given answers, per response token, as training counts them."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        config, tokenizer = setting.config, setting.tokenizer
        encoder = Encoder(tokenizer, config.data.max_length, chat_rules(config, tokenizer))
        self.questions = Questions[Document](setting, task)
        encoded_rows(self.questions, encoder, lambda encoded, fields, where: marked(encoded)[0])
        self._documents = [each.asked for each in self.questions.kept]
        self.questions.checked(self._documents, limit="data.max_length")
        self.questions.known["tokens"] = [int(mask.sum()) for _, mask in self._documents]

    def judge(self, judge: Judge) -> list[Item]:
        return self.questions.results({"nll": judge.losses(self._documents, self.questions.places)})


class PreferenceAccuracy(Task):
    """How often the chosen answer of a pair is likelier than the rejected one: as a whole, and per
    token."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        config, tokenizer = setting.config, setting.tokenizer
        encoder = PairEncoder(tokenizer, *pair_lengths(config), chat_rules(config, tokenizer))
        self.questions = Questions[list[Document]](setting, task)
        encoded_rows(self.questions, encoder, lambda encoded, fields, where: marked(encoded))
        self._documents = [each for of_pair in self.questions.kept for each in of_pair.asked]
        self.questions.checked(
            self._documents, limit="preference.max_prompt_tokens or max_response_tokens"
        )
        tokens = [int(mask.sum()) for _, mask in self._documents]
        self.questions.known["tokens"] = np.array(tokens).reshape(-1, 2).tolist()

    def judge(self, judge: Judge) -> list[Item]:
        places = [place for place in self.questions.places for _ in range(2)]
        nll = np.array(judge.losses(self._documents, places)).reshape(-1, 2)
        mean = nll / np.array(self.questions.known["tokens"])
        return self.questions.results(
            {
                "accuracy": (nll[:, 0] < nll[:, 1]).astype(float).tolist(),
                "accuracy_norm": (mean[:, 0] < mean[:, 1]).astype(float).tolist(),
                "nll": nll.tolist(),
            }
        )


@dataclass(frozen=True)
class Choices:
    """A context, its possible continuations, and which one is right."""

    context: str
    continuations: tuple[str, ...]
    right: int


class MultipleChoice(Task):
    """How often the right continuation is the likeliest: by the log-likelihood of all of it
    (`acc`), and by that per character (`acc_norm`), as lm-eval's metrics of these names."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        self.questions = Questions[Choices](setting, task)
        self._documents: list[Document] = []
        for where, row in raw_rows(setting, task):
            choices = choices_of(row.fields, where)
            self.questions.add(where, row.fields, choices)
            for text in choices.continuations:
                whole, start = continued(setting.tokenizer, choices.context, f" {text}", where)
                over = max(0, len(whole) - setting.config.evaluation.max_length)
                if over:
                    self.questions.counts["choices whose context was cut on the left"] += 1
                self._documents.append(document(whole[over:], max(1, start - over)))
        self.questions.checked(self._documents)

    def judge(self, judge: Judge) -> list[Item]:
        asked = [each.asked for each in self.questions.kept]
        places = [
            place
            for place, each in zip(self.questions.places, asked, strict=True)
            for _ in each.continuations
        ]
        losses = iter(judge.losses(self._documents, places))
        nll = [[next(losses) for _ in each.continuations] for each in asked]
        columns: dict[str, list[Any]] = {"acc": [], "acc_norm": [], "nll": nll}
        for each, own in zip(asked, nll, strict=True):
            characters = np.array([len(text) for text in each.continuations])
            columns["acc"].append(float(np.argmin(own) == each.right))
            columns["acc_norm"].append(float(np.argmin(own / characters) == each.right))
        return self.questions.results(columns)


def choices_of(fields: dict[str, Any], where: str) -> Choices:
    """A row of HellaSwag's or ARC's form, as published or with `ctx`, and a `label` that counts
    from 0, as the text that lm-eval makes of it. Raises UserError naming what is wrong with it."""
    if "endings" in fields:
        return _hellaswag(fields, where)
    if "choices" in fields and "question" in fields:
        return _arc(fields, where)
    raise UserError(
        f"{where}: multiple_choice reads rows with 'ctx', 'endings' and 'label' (HellaSwag), or "
        f"'question', 'choices' and 'label' (ARC); this one has {', '.join(sorted(fields))}"
    )


def _hellaswag(fields: dict[str, Any], where: str) -> Choices:
    if all(name in fields for name in ("ctx_a", "ctx_b", "activity_label")):
        activity, first, second = (
            text_of(fields, name, where) for name in ("activity_label", "ctx_a", "ctx_b")
        )
        context = f"{activity}: {first} {second.capitalize()}"
    elif "ctx" in fields:
        context = text_of(fields, "ctx", where)
    else:
        raise UserError(
            f"{where}: rows with 'endings' need 'ctx', or 'ctx_a', 'ctx_b' and "
            f"'activity_label'; this one has {', '.join(sorted(fields))}"
        )
    endings = _texts(fields["endings"], "endings", where)
    cleaned = [_as_hellaswag(each) for each in endings]
    for ending, text in zip(endings, cleaned, strict=True):
        if not text:
            raise UserError(
                f"{where}: nothing is left of the ending {ending!r} once what is in brackets is "
                "removed, which is WikiHow's markup"
            )
    right = _label(fields.get("label"), len(endings), where)
    return Choices(_as_hellaswag(context), tuple(cleaned), right)


def _arc(fields: dict[str, Any], where: str) -> Choices:
    question = text_of(fields, "question", where)
    given = fields["choices"]
    if isinstance(given, dict):  # as published
        texts = _texts(given.get("text"), "choices.text", where)
        names, key = given.get("label"), fields.get("answerKey")
        if not isinstance(names, list) or len(names) != len(texts) or key not in names:
            raise UserError(
                f"{where}: 'answerKey' must be one of the {len(texts)} names in 'choices.label', "
                f"but is {key!r} and these are {str(names)[:80]}"
            )
        right = names.index(key)
    else:
        texts = _texts(given, "choices", where)
        right = _label(fields.get("label"), len(texts), where)
    return Choices(f"Question: {question}\nAnswer:", tuple(texts), right)


def _as_hellaswag(text: str) -> str:
    """A text of HellaSwag without what WikiHow's markup has left in it, as lm-eval cleans it."""
    cleaned = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return cleaned.replace("  ", " ")


def _texts(value: Any, name: str, where: str) -> list[str]:
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not all(isinstance(each, str) and each.strip() for each in value)
    ):
        raise UserError(
            f"{where}: {name!r} must be a list of at least 2 texts, but is {str(value)[:80]}"
        )
    return [checked_text(name, each, where) for each in value]


def _label(value: Any, choices: int, where: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or not 0 <= number < choices:
        raise UserError(
            f"{where}: 'label' must be the number of the right one of {choices} choices, from 0, "
            f"but is {value!r}"
        )
    return number


class Perplexity(Task):
    """The loss of text, per token and per byte of UTF-8, as lm-eval's rolling log-likelihoods:
    every token is predicted once, the first from BOS (without one, EOS)."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        tokenizer, width = setting.tokenizer, setting.config.evaluation.max_length
        self.questions = Questions[list[Document]](setting, task)
        sizes: list[int] = []
        first = tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if first is None else first
        if prefix is None:
            raise UserError(
                f"evaluation task {task.called}: the tokenizer of "
                f"{setting.config.model.name_or_path} has neither BOS nor EOS to begin a text with"
            )
        for where, row in raw_rows(setting, task):
            text = text_of(row.fields, "text", where)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                self.questions.counts["skipped: empty text"] += 1
                continue
            self.questions.add(where, row.fields, windows([prefix, *ids], width))
            sizes.append(len(text.encode("utf-8")))
        kept = self.questions.kept
        self._documents = [each for question in kept for each in question.asked]
        self.questions.checked(self._documents)
        tokens = [sum(int(mask.sum()) for _, mask in each.asked) for each in kept]
        self.questions.known |= {"tokens": tokens, "bytes": sizes}

    def judge(self, judge: Judge) -> list[Item]:
        kept = self.questions.kept
        places = [
            place
            for place, each in zip(self.questions.places, kept, strict=True)
            for _ in each.asked
        ]
        losses = iter(judge.losses(self._documents, places))
        return self.questions.results(
            {"nll": [sum(next(losses) for _ in each.asked) for each in kept]}
        )


class ExactMatch(Task):
    """How often the generated answer is the reference's: its last number, or its whole text."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        config, tokenizer = setting.config, setting.tokenizer
        rules = chat_rules(config, tokenizer)
        encoder = PromptEncoder(tokenizer, config.evaluation.max_length, rules)
        self.questions = Questions[tuple[list[int], str]](setting, task)
        encoded_rows(
            self.questions,
            encoder,
            lambda encoded, fields, where: (
                encoded.documents[0].input_ids,
                self._reference(fields, where),
            ),
        )
        prompts = [document(each.asked[0]) for each in self.questions.kept]
        self.questions.checked(prompts, more=task.max_new_tokens)

    def _reference(self, fields: dict[str, Any], where: str) -> str:
        """The answer of a row. Raises UserError where it has none, or none that can be compared."""
        if is_tokenised(fields):
            raise UserError(f"{where}: exact_match compares texts, and this row comes as tokens")
        last = as_chat(fields, where).messages[-1]
        if last["role"] != "assistant":
            raise UserError(
                f"{where}: the conversation does not end with an answer to compare with"
            )
        text = str(last["content"])
        if self.settings.match == "number" and last_number(text) is None:
            raise UserError(
                f"{where}: the reference has no number ({text[:60]!r}); set match: text for "
                f"evaluation task {self.settings.called} to compare whole texts"
            )
        return text

    def judge(self, judge: Judge) -> list[Item]:
        kept = self.questions.kept
        answers = judge.answers([each.asked[0] for each in kept], self.settings.max_new_tokens)
        right = [
            float(self._is_right(answer, each.asked[1]))
            for answer, each in zip(answers, kept, strict=True)
        ]
        return self.questions.results({"exact_match": right, "answer": answers})

    def _is_right(self, answer: str, reference: str) -> bool:
        if self.settings.match == "text":
            return answer.strip() == reference.strip()
        return last_number(answer) == last_number(reference)


BUILDERS: dict[str, Callable[[Setting, EvaluationTask], Task]] = {
    "target_loss": TargetLoss,
    "exact_match": ExactMatch,
    "multiple_choice": MultipleChoice,
    "perplexity": Perplexity,
    "preference_accuracy": PreferenceAccuracy,
    "humaneval": Programs,
    "mbpp": Programs,
}


def build_task(setting: Setting, task: EvaluationTask) -> Task:
    """Reads and tokenises what a task asks. Raises UserError for bad rows."""
    return BUILDERS[task.task](setting, task)
