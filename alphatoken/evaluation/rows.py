"""Rows that a task asks about, and what it keeps of each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from alphatoken.config.evaluation import EvaluationTask
from alphatoken.config.preference import PreferenceConfig, PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source
from alphatoken.data.cache import Document
from alphatoken.data.chat import Encoded, RowEncoder, Skipped
from alphatoken.data.pretrained import embeddings_of, read_settings
from alphatoken.data.rows import checked_text, named
from alphatoken.data.sources import OpenSource, Row, location
from alphatoken.errors import UserError
from alphatoken.evaluation.judge import Judge
from alphatoken.evaluation.measures import Item

QuestionT = TypeVar("QuestionT")


@dataclass(frozen=True)
class Question(Generic[QuestionT]):
    """One item of a task before the model is asked."""

    row: str
    """Where it came from: `file:line`."""
    id: str
    """A hash of its content, by which two evaluations find the same item."""
    asked: QuestionT


@dataclass(frozen=True)
class Setting:
    """What tasks are built from."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase


def pair_lengths(config: RunConfig) -> tuple[int, int]:
    """Longest prompt and response of a pair."""
    lengths = config.preference if isinstance(config, PreferenceRunConfig) else PreferenceConfig()
    return lengths.max_prompt_tokens, lengths.max_response_tokens


@dataclass
class Questions(Generic[QuestionT]):
    """The items of a task, and how many rows were left out or cut."""

    setting: Setting
    task: EvaluationTask
    kept: list[Question[QuestionT]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    known: dict[str, Sequence[Any]] = field(default_factory=dict)
    """What of each item is known before the model is asked, by column: its `tokens`, say."""

    def add(self, row: str, content: object, asked: QuestionT) -> None:
        """Keeps a question about `content`, anything that JSON can hold."""
        text = json.dumps(content, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.kept.append(Question(row, digest, asked))

    @property
    def places(self) -> list[str]:
        """What each item is called in errors."""
        return [f"evaluation task {self.task.called}, {each.row}" for each in self.kept]

    @property
    def notes(self) -> list[str]:
        """What was counted, a sentence each."""
        return [
            f"evaluation task {self.task.called}: {count} {what}"
            for what, count in self.counts.items()
        ]

    def checked(
        self, documents: Sequence[Document], *, limit: str = "evaluation.max_length", more: int = 0
    ) -> None:
        """Raises UserError where there is nothing to ask, a token without an embedding, or a text
        that with `more` generated tokens is longer than the model has positions. `limit` is the
        key that bounds the texts."""
        if not self.kept:
            reasons = ", ".join(f"{count} {what}" for what, count in self.counts.items())
            raise UserError(
                f"evaluation task {self.task.called} has no usable row ({reasons or 'none'})"
            )
        self._check_positions(max(len(ids) for ids, _ in documents), limit, more)
        if not self.setting.config.model.resize_embeddings:
            self._check_embeddings(max(int(ids.max(initial=0)) for ids, _ in documents))

    def _check_positions(self, longest: int, limit: str, more: int) -> None:
        name = self.setting.config.model.name_or_path
        settings = read_settings(name).get_text_config()
        positions = getattr(settings, "max_position_embeddings", None)
        if positions is None or longest + more <= positions:
            return
        room = positions - more
        advice = f"lower {limit} to fit into {room}"
        if not 0 < room < longest:
            advice = "lower max_new_tokens of the task"
        generated = f", {more} of them to be generated" if more else ""
        raise UserError(
            f"evaluation task {self.task.called} has a text of {longest + more} tokens{generated}, "
            f"but {name} has {positions} positions: {advice}"
        )

    def _check_embeddings(self, highest: int) -> None:
        name = self.setting.config.model.name_or_path
        embeddings = embeddings_of(name)
        if highest >= embeddings:
            raise UserError(
                f"evaluation task {self.task.called} has the token "
                f"{self.setting.tokenizer.convert_ids_to_tokens(highest)!r} of id {highest}, but "
                f"{name} has {embeddings} embeddings: use the tokenizer that the "
                "model was published with"
            )

    def results(self, columns: Mapping[str, Sequence[Any]] = MappingProxyType({})) -> list[Item]:
        """Items with what is known and what was found of each, by column."""
        return [
            {
                "row": each.row,
                "id": each.id,
                **{name: column[place] for name, column in {**self.known, **columns}.items()},
            }
            for place, each in enumerate(self.kept)
        ]


class Task(Protocol):
    """What a model is asked, read and tokenised."""

    settings: EvaluationTask
    questions: Questions[Any]

    def judge(self, judge: Judge) -> list[Item]:
        """Every item with its `row`, `id` and numbers, the same on every rank. Every rank must
        call it."""
        ...


def sources_of(setting: Setting, task: EvaluationTask) -> list[Source]:
    """The sources of a task's rows. Raises UserError where there are none."""
    sources = task.data
    if sources is None and task.traits.reads_eval:
        sources = setting.config.data.eval
    if sources is None:
        also = ", or data.eval" if task.traits.reads_eval else ""
        raise UserError(
            f"evaluation task {task.called} has no rows: give it data, as in "
            f"{{task: {task.task}, data: rows.jsonl}}{also}"
        )
    return sources


def raw_rows(setting: Setting, task: EvaluationTask) -> Iterator[tuple[str, Row]]:
    """Each row as it is, and where it stands."""
    for source in sources_of(setting, task):
        for row in OpenSource(source).raw():
            yield location(source, row.number), row


def encoded_rows(
    questions: Questions[QuestionT],
    encoder: RowEncoder,
    made: Callable[[Encoded, dict[str, Any], str], QuestionT],
) -> None:
    """Adds what `made` makes of each row that an encoder knows how to tokenise; one of several
    answers becomes several."""
    for source in sources_of(questions.setting, questions.task):
        for row in OpenSource(source).read():
            where = location(source, row.number)
            with named(where):
                found = encoder.encode(row.fields, where)
            if isinstance(found, Skipped):
                questions.counts[f"skipped: {found.reason}"] += 1
                continue
            for number, encoded in enumerate(found):
                questions.counts.update(encoded.cut)
                questions.add(where, [row.fields, number], made(encoded, row.fields, where))


def text_of(fields: Mapping[str, Any], name: str, where: str) -> str:
    """A column that must be text. Raises UserError where it is not there or something else."""
    if name not in fields:
        raise UserError(f"{where}: {name!r} must be text, but the row has {', '.join(fields)}")
    return checked_text(name, fields[name], where)


def marked(encoded: Encoded) -> list[Document]:
    """The documents of a tokenised row, with its response tokens marked."""
    documents = []
    for each in encoded.documents:
        mask = np.array(each.response_mask, dtype=bool)
        mask[:1] = False  # nothing predicts the first token of a document
        documents.append((np.array(each.input_ids, dtype=np.int32), mask))
    return documents
