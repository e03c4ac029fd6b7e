"""What of a conversation is trained: the one place that decides.

The assistant's turn is what a model has to generate: from behind the text that asks for it to the
first stop token behind what the message says. Where a template marks the assistant's turns itself
(`{% generation %}`), its marks are followed; those around what others say count for nothing.

A turn is rendered as inference would see it, with what comes before it and nothing after. Where the
whole conversation begins with that text for every turn, it is trained as one; where a template
writes earlier turns differently once others follow (without their reasoning, say), every turn
becomes a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alphatoken.data.chat_template import ChatRules, ChatTemplate, Span, refused
from alphatoken.data.rows import (
    Chat,
    Message,
    answer_of,
    asks_anything,
    is_trained,
    says_anything,
)
from alphatoken.data.said import (
    alike,
    behind_empty,
    behind_question,
    behind_reasoning,
    check_said,
    other_opening,
    search_start,
    stands_in,
)
from alphatoken.errors import UserError

TURN_CLOSED = re.compile("(w*o+)w[wo]*")
"""What follows the text of a turn that is over: own tokens of the template (o), then white space
(w)."""
LONGEST_STOP = 64
"""Characters of a token that ends a turn, at most."""
FAR = 200
"""Characters, at least, that are tokenised before a place where tokens are looked at."""
PROBE: list[Message] = [
    {"role": "user", "content": "Ready?"},
    {"role": "assistant", "content": "Yes."},
]
"""A conversation that every template can render, but those that want more than a chat."""

UNASKED = "assistant turns that answer nothing (not trained)"
EMPTY = "empty assistant turns (not trained)"
APART = "conversations trained as a row per turn, as the chat template rewrites earlier ones"
UNSAID_TOOLS = "conversations whose tools the chat template leaves out"
UNSAID_MESSAGE = "conversations where the chat template leaves out a message of others"
OTHER_OPENING = "answers that the chat template marks behind another text than inference has there"


@dataclass(frozen=True)
class Rendering:
    """The text of a conversation, or of its beginning, and what of it is trained."""

    text: str
    messages: int
    """How many messages of the conversation it has."""
    answers: tuple[int, ...]
    """Which of them are trained, by index."""
    spans: tuple[Span, ...]
    """Characters of `text` that are trained, in order."""
    asked: tuple[str, ...]
    """The text that precedes each answer."""
    notes: tuple[str, ...] = ()
    """What is to be said of the conversation, for counting."""


@dataclass(frozen=True)
class _Turn:
    """An answer with all that precedes it, as inference would see it."""

    index: int
    text: str
    spans: tuple[Span, ...]
    asked: str
    closing: str
    """The stop token with which the next speaker would begin, where the turn ends without one."""
    notes: tuple[str, ...]


class Renderer:
    """Conversations as their chat template writes them, with what of them is trained. Raises
    UserError for a template that `ChatTemplate` refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: ChatRules) -> None:
        self.template = ChatTemplate(tokenizer, rules)
        self._tokenizer = tokenizer
        self._rules = rules
        self._stops = {*rules.stop_tokens, tokenizer.eos_token_id}
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what is rendered and trained. The order of keys is part of what
        caches are named by."""
        return {
            **self.template.sources,
            "stops": sorted(self._stops),
            "variables": self.template.variables,
            "turns": self._rules.turns,
        }

    def end_of_turn(self) -> int | None:
        """The token of its own with which the template ends an answer, as far as that is trained;
        None where it ends with text, or where the template refuses a question and its answer."""
        try:
            (found,) = self.renderings(Chat(PROBE), "a question and its answer")
        except (UserError, ValueError):
            return None
        (start, end), *_ = found.spans[-1:]
        *_, (token, _) = self._tokens(found.text[start:end].rstrip())
        return token if token in self._special else None

    def prompt(self, chat: Chat, where: str) -> str:
        """The text that precedes an answer to a conversation."""
        return self.template.checked_text(chat, where, asks=True)[0]

    def renderings(self, chat: Chat, where: str, first: int = 0) -> list[Rendering]:
        """The conversation with what is trained of its messages from `first` on: one text, or one
        for each turn; none where no turn can be trained.

        Raises UserError, naming `where`, for a conversation that the template refuses, one whose
        answer it drops, and one that it asks for with other text than it writes before it.
        """
        whole, _ = self.template.checked_text(chat, where)
        turns: list[_Turn] = []
        notes: list[str] = []
        places, only_last = range(first, len(chat.messages)), self._rules.turns == "last"
        for index in reversed(places) if only_last else places:
            message = chat.messages[index]
            if message["role"] != "assistant" or not is_trained(message):
                continue
            found = self._turn(chat, index, where) if self._has_answer(message) else EMPTY
            if isinstance(found, str):
                notes.append(found)
                continue
            turns.append(found)
            if only_last:
                break
        notes += [note for turn in turns for note in turn.notes]
        names = [tool.get("function", tool).get("name") for tool in chat.tools or []]
        if names and not any(str(name) in whole for name in names):
            notes.append(UNSAID_TOOLS)
        if not turns:
            return []
        texts = [whole, *(turn.text for turn in turns)]
        others = [message for message in chat.messages if message["role"] != "assistant"]
        if not all(any(stands_in(message, text) for text in texts) for message in others):
            notes.append(UNSAID_MESSAGE)
        if all(whole.startswith(turn.text[: turn.spans[-1][1]]) for turn in turns):
            return [self._together(whole, len(chat.messages), turns, notes)]
        if len(turns) > 1:
            notes.append(APART)
        return [
            self._together(turn.text, turn.index + 1, [turn], [] if number else notes)
            for number, turn in enumerate(turns)
        ]

    def _has_answer(self, message: Message) -> bool:
        """Whether a message says anything that is trained."""
        if self._rules.train_reasoning:
            return says_anything(message)
        return bool(answer_of(message) or message.get("tool_calls"))

    def _together(
        self, text: str, messages: int, turns: Sequence[_Turn], notes: Sequence[str]
    ) -> Rendering:
        """Turns in one text that begins as each of theirs."""
        spans = []
        for turn in turns:
            *inner, (start, end) = turn.spans
            if end == len(text):
                text += turn.closing
            spans += [*inner, (start, end + self._stop_behind(text, (start, end)))]
        return Rendering(
            text=text,
            messages=messages,
            answers=tuple(turn.index for turn in turns),
            spans=tuple(spans),
            asked=tuple(turn.asked for turn in turns),
            notes=tuple(notes),
        )

    def _stop_behind(self, text: str, span: Span) -> int:
        """Characters of a stop token directly behind an answer that has none: of templates in which
        the next speaker's header ends a turn."""
        start, end = span
        behind = [] if self.template.is_marked else self._tokens(text[end : end + LONGEST_STOP])
        if not behind or behind[0][0] not in self._stops or behind[0][1][0] > 0:
            return 0
        said = self._tokens(text[start:end])
        return 0 if any(token in self._stops for token, _ in said) else behind[0][1][1]

    def _turn(self, chat: Chat, index: int, where: str) -> _Turn | str:
        """An answer with what precedes it; why it is not trained where nothing asks for it."""
        before = chat.first(index)
        if not asks_anything(before.messages):
            return UNASKED
        try:
            asked, _ = self.template.text(before, asks=True)
            text, marks = self.template.text(chat.first(index + 1))
            start = len(asked)
            if self.template.is_marked:
                start = alike(text, self.template.text(before)[0])
            elif not text.startswith(asked):
                plain, _ = self.template.text(before)
                pair = chat.messages[index - 1 : index + 1]
                text = (
                    behind_empty(asked, text) or behind_question(asked, plain, text, *pair) or text
                )
        except TemplateError as error:
            raise refused(where, error) from None
        message = chat.messages[index]
        if self.template.is_marked:
            spans = tuple(span for span in marks if span[0] >= start) or tuple(
                span for span in marks if span[1] > start
            )
            opening = () if text.startswith(asked) else (OTHER_OPENING,)
            if not spans:
                raise UserError(
                    f"{where}: the chat template's generation marks leave out message {index + 1}, "
                    "an answer; correct them, or take them out"
                )
        else:
            if not text.startswith(asked):
                raise UserError(f"{where}: {other_opening(asked, text, index, message)}")
            spans = ((start, self._end(text, start, message)),)
            opening = ()
        unsaid = check_said(message, text, start, f"{where}: message {index + 1}")
        if not self._rules.train_reasoning:
            answered = behind_reasoning(message, text, start)
            spans = tuple((max(left, answered), right) for left, right in spans if right > answered)
            if not spans:
                return EMPTY
        closing = self._closing(chat.first(index + 1), text, spans[-1])
        return _Turn(index, text, spans, asked, closing, (*opening, *unsaid))

    def _closing(self, chat: Chat, text: str, span: Span) -> str:
        """The stop token that ends a turn, and that a template writes only once somebody else
        speaks: the model generates it."""
        start, end = span
        if self.template.is_marked or end < len(text):
            return ""
        said = self._tokens(text[max(start, end - LONGEST_STOP) : end])
        if not said or said[-1][0] in self._stops:
            return ""
        next_role = "tool" if chat.messages[-1].get("tool_calls") else "user"
        try:
            longer, _ = self.template.text(chat.and_then([{"role": next_role, "content": "?"}]))
        except TemplateError:
            return ""
        if not longer.startswith(text):  # what follows takes reasoning away
            answer = text[behind_reasoning(chat.messages[-1], text, start) : end]
            start = longer.rfind(answer)
            end = start + len(answer)
        return longer[end : end + self._stop_behind(longer, (start, end))] if start >= 0 else ""

    def _end(self, text: str, start: int, message: Message) -> int:
        """Where what a model generates of a turn from `start` on ends: with the first stop token
        behind the message's text.

        Some templates end a turn with a token that is not known to stop, and a line break, before
        they write one that is: then up to the line break. Without any stop token: up to the last
        of the template's own tokens, where only white space follows it, or all.
        """
        answer, begins = answer_of(message), behind_reasoning(message, text, start)
        begins = begins if begins > start else search_start(start, answer)
        place = text.find(answer, begins) if answer else -1
        behind = place + len(answer) if place >= 0 else start
        # A tokenizer does not look far back, so most of the text need not be tokenised for this.
        near = max(start, text.rfind(" ", start, max(start, behind - FAR)))
        kinds, ends = "", []
        for token, (first, last) in self._tokens(text[near:]):
            if near + first < behind:
                continue
            end = near + last
            if token in self._stops and not TURN_CLOSED.fullmatch(kinds):
                return end
            is_own = token in self._special
            kinds += "o" if is_own else "w" if not text[near + first : end].strip() else "x"
            ends.append(end)
        if closed := TURN_CLOSED.fullmatch(kinds):
            return ends[len(closed[1]) - 1]
        own = kinds.rstrip("w")
        return ends[len(own) - 1] if own.endswith("o") else len(text)

    def _tokens(self, text: str) -> list[tuple[int, Span]]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
