"""A tokenizer's chat template: the text that it makes of a conversation, and the shipped template
that training uses in its place."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alphatoken.config.sections import TODAY, Turns
from alphatoken.data.rows import (
    END_OF_REASONING,
    REASONING,
    Chat,
    Message,
    reasoning_of,
    with_reasoning_in,
)
from alphatoken.data.templates import shipped_template, training_names
from alphatoken.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(?P<form>[^'"]*)\1\s*\)""")

ANSWER: Message = {"role": "assistant", "content": "Say"}
THOUGHTFUL: Message = {"role": "assistant", "content": "<think>\nquartz umbrellas\n</think>\n\nSay"}
"""Answers that templates are tried with."""

Span = tuple[int, int]
"""First character, and the first behind the last."""


@dataclass(frozen=True)
class ChatRules:
    """How conversations are rendered, and which of their turns are trained."""

    stop_tokens: frozenset[int] = frozenset()
    """Every token at which generation stops; the tokenizer's EOS is one without being named."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template gets besides the messages (`model.chat_template_kwargs`)."""
    turns: Turns = "all"
    """Which of the assistant's turns are trained (`data.turns`)."""
    train_reasoning: bool = True
    """Whether reasoning is trained with the answer behind it (`data.train_reasoning`)."""
    training_template: str | None = None
    """The shipped template that rows without tools are rendered with in place of the tokenizer's
    own (`data.templates`), by name."""
    today: datetime.date = TODAY
    """What a template that writes today's date writes (`model.chat_template_date`)."""


class ChatTemplate:
    """A tokenizer's chat template. Where it writes today's date (`strftime_now`), it writes that of
    its rules: the same row is then the same tokens on every day.

    Raises UserError for a tokenizer with several templates and no default, and for a template that
    writes the date in a form that only rendering tells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: ChatRules) -> None:
        try:
            source: str = tokenizer.get_chat_template()
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(
                f"the tokenizer has several chat templates and no default: set model.chat_template "
                f"to one of {names}"
            ) from None
        self.source = DATE_CALL.sub(
            lambda call: json.dumps(rules.today.strftime(call["form"])), source
        )
        if "strftime_now(" in self.source:
            raise UserError(
                "the chat template calls strftime_now with something else than a text, so its rows "
                "would be other tokens on another day; write the form there, or the date itself "
                "(model.chat_template)"
            )
        own = tokenizer.chat_template
        self._has_another_for_tools = isinstance(own, dict) and "tool_use" in own
        name = rules.training_template
        self._training = None if name is None else shipped_template(name)
        self.variables = {**tokenizer.special_tokens_map, **rules.variables}
        self.is_marked = GENERATION_MARK.search(self.source) is not None
        self._read: dict[str, list[str]] = {}

    @property
    def sources(self) -> dict[str, str]:
        """The templates that conversations are rendered with, by what they are for."""
        training = {} if self._training is None else {"training_template": self._training}
        return {**training, "template": self.source}

    def source_for(self, chat: Chat) -> str:
        """The source that a conversation is rendered with."""
        calls = any(each.get("tool_calls") or each["role"] == "tool" for each in chat.messages)
        return self.source if calls or chat.tools else self._training or self.source

    def as_read(self, chat: Chat) -> Chat:
        """A conversation with reasoning in the field that the template reads, whichever it is in:
        of templates that read one, and not what stands in the text before `</think>`."""
        template = self.source_for(chat)
        if template not in self._read:
            self._read[template] = [each for each in REASONING if self._reads(each, template)]
        read = self._read[template]
        if not read:
            return chat
        knows_text = END_OF_REASONING in template
        messages = [
            message
            if any(message.get(field) for field in read)
            or not reasoning_of(message)
            or (knows_text and END_OF_REASONING in message["content"])
            else with_reasoning_in(read[0], message)
            for message in chat.messages
        ]
        return Chat(messages, chat.tools)

    def _reads(self, field: str, template: str) -> bool:
        """Whether a template writes a field of an answer's reasoning."""
        thoughts = "quartz umbrellas"
        talk = [{"role": "user", "content": "Ask"}, {**ANSWER, field: thoughts}]
        try:
            return field in template and thoughts in self._written(talk, None, template)[0]
        except TemplateError:
            return False

    def asks_like(self, other: ChatTemplate) -> bool:
        """Whether what precedes an answer is the same as of another, in a few conversations."""
        told, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ask"}
        answers = ANSWER, THOUGHTFUL, with_reasoning_in(REASONING[0], THOUGHTFUL)
        talks = [asked], [told, asked], *([asked, answer, asked] for answer in answers)
        try:
            return all(
                self.text(Chat(talk), asks=True) == other.text(Chat(talk), asks=True)
                for talk in talks
            )
        except TemplateError:
            return False

    def keeps_reasoning(self) -> bool:
        """Whether an answer is written with its reasoning, behind what asks for it."""
        question, answer = (
            {"role": "user", "content": "Ask"},
            with_reasoning_in(REASONING[0], THOUGHTFUL),
        )
        try:
            asked, _ = self.text(Chat([question]), asks=True)
            text, _ = self.text(Chat([question, answer]))
        except TemplateError:
            return False
        return text.startswith(asked) and reasoning_of(answer) in text

    def text(self, chat: Chat, *, asks: bool = False) -> tuple[str, list[Span]]:
        """The text, and the template's own marks in it; with `asks` followed by what asks for an
        answer."""
        template = self.source_for(chat)
        return self._written(self.as_read(chat).messages, chat.tools, template, asks=asks)

    def checked_text(self, chat: Chat, where: str, *, asks: bool = False) -> tuple[str, list[Span]]:
        """`text`; raises UserError, naming `where`, for a conversation that the template refuses,
        and for one with tools that the tokenizer has another template for."""
        if chat.tools and self._has_another_for_tools:
            raise UserError(
                f"{where}: the row has tools, for which the tokenizer has a chat template of its "
                "own: set model.chat_template to tool_use, or to default to render such rows as "
                "the others"
            )
        try:
            return self.text(chat, asks=asks)
        except TemplateError as error:
            raise refused(where, error) from None

    def _written(
        self, messages: list[Message], tools: Any, template: str, *, asks: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=asks,
                return_assistant_tokens_mask=self.is_marked,
                **self.variables,
            )
            texts[0].encode()
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # What a template does to a value of another type, or of no sense; half of a character.
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return texts[0], [(start, end) for start, end in marks[0]] if self.is_marked else []


def refused(where: str, error: TemplateError) -> UserError:
    """What to say where a template refuses a conversation."""
    return UserError(f"{where}: the chat template refuses this conversation: {error}")


def training_template(tokenizer: PreTrainedTokenizerBase, rules: ChatRules) -> str | None:
    """The name of the shipped template that takes the place of the tokenizer's own in training:
    where that leaves out the reasoning of an answer, the one that keeps it and asks for answers in
    the same words. None where none does, or the own one is right."""
    own = ChatTemplate(tokenizer, rules)
    if own.is_marked or own.keeps_reasoning():
        return None
    for name in training_names():
        shipped = ChatTemplate(tokenizer, replace(rules, training_template=name))
        if own.asks_like(shipped) and shipped.keeps_reasoning():
            return name
    return None
