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

import bisect
import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alphatoken.config.sections import TODAY, Turns
from alphatoken.data.rows import REASONING, Chat, Message, asks_anything, is_trained, says_anything
from alphatoken.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(?P<form>[^'"]*)\1\s*\)""")
TURN_CLOSED = re.compile("(w*o+)w[wo]*")
"""What follows the text of a turn that is over: own tokens of the template (o), then white space
(w)."""
LONGEST_STOP = 64
"""Characters of a token that ends a turn, at most."""
FAR = 200
"""Characters, at least, that are tokenised before a place where tokens are looked at."""
RECOGNISED = 20
"""Characters at either end of a text, or half of it, by which it is found in what a template made
of it."""

Span = tuple[int, int]
"""First character, and the first behind the last."""

UNASKED = "assistant turns that answer nothing (not trained)"
EMPTY = "empty assistant turns (not trained)"
APART = "conversations trained as a row per turn, as the chat template rewrites earlier ones"
UNSAID_REASONING = "turns whose reasoning_content the chat template leaves out"
UNSAID_TEXT = "tool calls beside a text that the chat template leaves out"
UNSAID_TOOLS = "conversations whose tools the chat template leaves out"
OTHER_OPENING = "answers that the chat template marks behind another text than inference has there"


@dataclass(frozen=True)
class ChatRules:
    """How conversations are rendered, and which of their turns are trained."""

    stop_tokens: frozenset[int] = frozenset()
    """Every token at which generation stops; the tokenizer's EOS is one without being named."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template gets besides the messages (`model.chat_template_kwargs`)."""
    turns: Turns = "all"
    """Which of the assistant's turns are trained (`data.turns`)."""
    today: datetime.date = TODAY
    """What a template that writes today's date writes (`model.chat_template_date`)."""


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
    notes: tuple[str, ...]


class Renderer:
    """A tokenizer's chat template. Where it writes today's date (`strftime_now`), it writes that of
    its rules: the same row is then the same tokens on every day.

    Raises UserError for a tokenizer with several templates and no default, and for a template that
    writes the date in a form that only rendering tells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: ChatRules) -> None:
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(
                f"the tokenizer has several chat templates and no default: set model.chat_template "
                f"to one of {names}"
            ) from None
        self.template = DATE_CALL.sub(
            lambda call: json.dumps(rules.today.strftime(call["form"])), template
        )
        if "strftime_now(" in self.template:
            raise UserError(
                "the chat template calls strftime_now with something else than a text, so its rows "
                "would be other tokens on another day; write the form there, or the date itself "
                "(model.chat_template)"
            )
        own = tokenizer.chat_template
        self._has_another_for_tools = isinstance(own, dict) and "tool_use" in own
        self._tokenizer = tokenizer
        self._rules = rules
        self._variables = {**tokenizer.special_tokens_map, **rules.variables}
        self._is_marked = GENERATION_MARK.search(self.template) is not None
        self._stops = {*rules.stop_tokens, tokenizer.eos_token_id}
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what is rendered and trained."""
        return {
            "template": self.template,
            "stops": sorted(self._stops),
            "variables": self._variables,
            "turns": self._rules.turns,
        }

    def prompt(self, chat: Chat, where: str) -> str:
        """The text that precedes an answer to a conversation."""
        return self._render(chat, where, asks=True)[0]

    def renderings(self, chat: Chat, where: str, first: int = 0) -> list[Rendering]:
        """The conversation with what is trained of its messages from `first` on: one text, or one
        for each turn; none where no turn can be trained.

        Raises UserError, naming `where`, for a conversation that the template refuses, one whose
        answer it drops, and one that it asks for with other text than it writes before it.
        """
        whole, _ = self._render(chat, where)
        turns: list[_Turn] = []
        notes: list[str] = []
        places, only_last = range(first, len(chat.messages)), self._rules.turns == "last"
        for index in reversed(places) if only_last else places:
            message = chat.messages[index]
            if message["role"] != "assistant" or not is_trained(message):
                continue
            found = EMPTY if not says_anything(message) else self._turn(chat, index, where)
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
        if all(whole.startswith(turn.text[: turn.spans[-1][1]]) for turn in turns):
            return [self._together(whole, len(chat.messages), turns, notes)]
        if len(turns) > 1:
            notes.append(APART)
        return [
            self._together(turn.text, turn.index + 1, [turn], [] if number else notes)
            for number, turn in enumerate(turns)
        ]

    def _together(
        self, text: str, messages: int, turns: Sequence[_Turn], notes: Sequence[str]
    ) -> Rendering:
        """Turns in one text that begins as each of theirs."""
        spans = []
        for turn in turns:
            *inner, (start, end) = turn.spans
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
        behind = [] if self._is_marked else self._tokens(text[end : end + LONGEST_STOP])
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
            asked, _ = self._rendered(before, asks=True)
            text, marks = self._rendered(chat.first(index + 1))
            start = len(asked)
            if self._is_marked:
                start = _alike(text, self._rendered(before)[0])
            elif not text.startswith(asked):
                plain, _ = self._rendered(before)
                text = _behind(asked, plain, text, *chat.messages[index - 1 : index + 1]) or text
        except TemplateError as error:
            raise self._refused(where, error) from None
        message = chat.messages[index]
        if self._is_marked:
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
                raise UserError(f"{where}: {_other_opening(asked, text, index)}")
            spans = ((start, self._end(text, start, message)),)
            opening = ()
        unsaid = _check_said(message, text, start, f"{where}: message {index + 1}")
        return _Turn(index, text, spans, asked, (*opening, *unsaid))

    def _end(self, text: str, start: int, message: Message) -> int:
        """Where what a model generates of a turn from `start` on ends: with the first stop token
        behind the message's text.

        Some templates end a turn with a token that is not known to stop, and a line break, before
        they write one that is: then up to the line break. Without any stop token: up to the last
        of the template's own tokens, where only white space follows it, or all.
        """
        content = message["content"].strip()
        place = text.find(content, _from(start, content)) if content else -1
        behind = place + len(content) if place >= 0 else start
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

    def _render(self, chat: Chat, where: str, *, asks: bool = False) -> tuple[str, list[Span]]:
        if chat.tools and self._has_another_for_tools:
            raise UserError(
                f"{where}: the row has tools, for which the tokenizer has a chat template of its "
                "own: set model.chat_template to tool_use, or to default to render such rows as "
                "the others"
            )
        try:
            return self._rendered(chat, asks=asks)
        except TemplateError as error:
            raise self._refused(where, error) from None

    def _rendered(self, chat: Chat, *, asks: bool = False) -> tuple[str, list[Span]]:
        """The text, and the template's own marks in it; with `asks` followed by what asks for an
        answer."""
        try:
            texts, marks = render_jinja_template(
                [chat.messages],
                tools=chat.tools,
                chat_template=self.template,
                add_generation_prompt=asks,
                return_assistant_tokens_mask=self._is_marked,
                **self._variables,
            )
            texts[0].encode()
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            # What a template does to a value of another type; half of a character.
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return texts[0], [(start, end) for start, end in marks[0]] if self._is_marked else []

    @staticmethod
    def _refused(where: str, error: TemplateError) -> UserError:
        return UserError(f"{where}: the chat template refuses this conversation: {error}")


def _check_said(message: Message, text: str, start: int, where: str) -> tuple[str, ...]:
    """Notes on what the template leaves out of a turn that it asks for up to `start`. Raises
    UserError where that is the answer itself."""
    content, said = message["content"].strip(), text[start:]
    is_unsaid = bool(content) and not _is_in(content, text, start)
    if is_unsaid and not message.get("tool_calls"):
        raise UserError(
            f"{where} has a 'content' of which nothing is in the chat template's text "
            f"({_shown(said)}): the model would learn to say nothing; use another "
            "model.chat_template, or leave the row out"
        )
    reasoning = next((message[name].strip() for name in REASONING if message.get(name)), "")
    # Texts may name the tools that they are about to call.
    beside = said.replace(content, "", 1).replace(reasoning, "", 1)
    calls = Counter(call["function"]["name"] for call in message.get("tool_calls") or [])
    for name, count in calls.items():
        if beside.count(name) < count:
            raise UserError(
                f"{where} calls the tool {name!r} in 'tool_calls', but the chat template does not "
                f"write all tool calls ({_shown(said)}): the model would learn to leave them out; "
                "use a model.chat_template that does, or leave the row out"
            )
    notes = (UNSAID_TEXT,) if is_unsaid else ()
    return (*notes, UNSAID_REASONING) if reasoning and not _is_in(reasoning, text, start) else notes


def _is_in(part: str, text: str, start: int) -> bool:
    """Whether a text stands in another from `start` on, perhaps shortened at one end."""
    length = min(RECOGNISED, (len(part) + 1) // 2)
    ends = part[:length], part[-length:]
    return any(text.find(end, _from(start, end)) >= 0 for end in ends)


def _from(start: int, part: str) -> int:
    """From where a text is looked for that reaches beyond `start`: what asks for an answer may be
    its beginning (`<think>`)."""
    return max(0, start - len(part) + 1)


def _other_opening(asked: str, text: str, index: int) -> str:
    """Why an answer cannot be trained that does not stand behind what asks for it."""
    same = _alike(asked, text)
    return (
        f"inference would begin message {index + 1} behind {_shown(asked[same:])}, but the chat "
        f"template writes {_shown(text[same:])} there; set model.chat_template_kwargs so that both "
        "are the same (for many reasoning models {enable_thinking: false}), put the reasoning into "
        "the row, or use another model.chat_template"
    )


def _behind(asked: str, plain: str, text: str, last: Message, answer: Message) -> str | None:
    """What asks for an answer with the answer behind it, where a template that writes the answer
    moves or drops something far before it (a system text, earlier reasoning). None where the last
    message, and what asks behind it, do not stand in `text` before the answer.

    `plain` is `asked` without what asks.
    """
    content, said = last["content"].strip(), answer["content"].strip()
    place = plain.rfind(content)
    if not content or place < 0 or not asked.startswith(plain):
        return None
    near, end = asked[place:], text.rfind(said)
    start = text.rfind(near, 0, end if said and end >= 0 else len(text))
    return asked + text[start + len(near) :] if start >= 0 else None


def _alike(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    places = range(1, min(len(first), len(second)) + 1)
    return bisect.bisect_left(places, 1, key=lambda end: not first.startswith(second[:end]))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
