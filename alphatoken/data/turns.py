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
    answer_of,
    asks_anything,
    is_trained,
    reasoning_of,
    says_anything,
    with_reasoning_in,
)
from alphatoken.data.templates import shipped_template, training_names
from alphatoken.errors import UserError

EMPTY_REASONING = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*$")
"""What asks for an answer without reasoning."""
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(?P<form>[^'"]*)\1\s*\)""")
WORD = re.compile(r"\w+")
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

PROBE: list[Message] = [
    {"role": "user", "content": "Ready?"},
    {"role": "assistant", "content": "Yes."},
]
"""A conversation that every template can render, but those that want more than a chat."""
ANSWER: Message = {"role": "assistant", "content": "Say"}
THOUGHTFUL: Message = {"role": "assistant", "content": "<think>\nquartz umbrellas\n</think>\n\nSay"}
"""Answers that templates are tried with."""

Span = tuple[int, int]
"""First character, and the first behind the last."""

UNASKED = "assistant turns that answer nothing (not trained)"
EMPTY = "empty assistant turns (not trained)"
APART = "conversations trained as a row per turn, as the chat template rewrites earlier ones"
UNSAID_REASONING = "turns whose reasoning the chat template leaves out"
UNSAID_TEXT = "tool calls beside a text that the chat template leaves out"
UNSAID_TOOLS = "conversations whose tools the chat template leaves out"
UNSAID_MESSAGE = "conversations where the chat template leaves out a message of others"
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
    train_reasoning: bool = True
    """Whether reasoning is trained with the answer behind it (`data.train_reasoning`)."""
    training_template: str | None = None
    """The shipped template that rows without tools are rendered with in place of the tokenizer's
    own (`data.templates`), by name."""
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
    closing: str
    """The stop token with which the next speaker would begin, where the turn ends without one."""
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
        name = rules.training_template
        self._training = None if name is None else shipped_template(name)
        self._tokenizer = tokenizer
        self._rules = rules
        self._variables = {**tokenizer.special_tokens_map, **rules.variables}
        self.is_marked = GENERATION_MARK.search(self.template) is not None
        self._stops = {*rules.stop_tokens, tokenizer.eos_token_id}
        self._read: dict[str, list[str]] = {}
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what is rendered and trained."""
        return {
            **({} if self._training is None else {"training_template": self._training}),
            "template": self.template,
            "stops": sorted(self._stops),
            "variables": self._variables,
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

    def template_of(self, chat: Chat) -> str:
        """The template that a conversation is rendered with."""
        calls = any(each.get("tool_calls") or each["role"] == "tool" for each in chat.messages)
        return self.template if calls or chat.tools else self._training or self.template

    def as_read(self, chat: Chat) -> Chat:
        """A conversation with reasoning in the field that the template reads, whichever it is in:
        of templates that read one, and not what stands in the text before `</think>`."""
        template = self.template_of(chat)
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

    def asks_like(self, other: Renderer) -> bool:
        """Whether what precedes an answer is the same as of another, in a few conversations."""
        told, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ask"}
        answers = ANSWER, THOUGHTFUL, with_reasoning_in(REASONING[0], THOUGHTFUL)
        talks = [asked], [told, asked], *([asked, answer, asked] for answer in answers)
        try:
            return all(
                self._rendered(Chat(talk), asks=True) == other._rendered(Chat(talk), asks=True)
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
            asked, _ = self._rendered(Chat([question]), asks=True)
            text, _ = self._rendered(Chat([question, answer]))
        except TemplateError:
            return False
        return text.startswith(asked) and reasoning_of(answer) in text

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
        if not all(any(_stands(message, text) for text in texts) for message in others):
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
        behind = [] if self.is_marked else self._tokens(text[end : end + LONGEST_STOP])
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
            if self.is_marked:
                start = _alike(text, self._rendered(before)[0])
            elif not text.startswith(asked):
                plain, _ = self._rendered(before)
                pair = chat.messages[index - 1 : index + 1]
                text = _behind_empty(asked, text) or _behind(asked, plain, text, *pair) or text
        except TemplateError as error:
            raise self._refused(where, error) from None
        message = chat.messages[index]
        if self.is_marked:
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
                raise UserError(f"{where}: {_other_opening(asked, text, index, message)}")
            spans = ((start, self._end(text, start, message)),)
            opening = ()
        unsaid = _check_said(message, text, start, f"{where}: message {index + 1}")
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
        if self.is_marked or end < len(text):
            return ""
        said = self._tokens(text[max(start, end - LONGEST_STOP) : end])
        if not said or said[-1][0] in self._stops:
            return ""
        next_role = "tool" if chat.messages[-1].get("tool_calls") else "user"
        try:
            longer, _ = self._rendered(chat.and_then([{"role": next_role, "content": "?"}]))
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
        begins = begins if begins > start else _from(start, answer)
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
        template = self.template_of(chat)
        return self._written(self.as_read(chat).messages, chat.tools, template, asks=asks)

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
                **self._variables,
            )
            texts[0].encode()
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            # What a template does to a value of another type; half of a character.
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return texts[0], [(start, end) for start, end in marks[0]] if self.is_marked else []

    @staticmethod
    def _refused(where: str, error: TemplateError) -> UserError:
        return UserError(f"{where}: the chat template refuses this conversation: {error}")


def _check_said(message: Message, text: str, start: int, where: str) -> tuple[str, ...]:
    """Notes on what the template leaves out of a turn that it asks for up to `start`. Raises
    UserError where that is the answer itself."""
    content, said = message["content"].strip(), text[start:]
    reasoning, answer = reasoning_of(message), answer_of(message)
    is_unsaid = bool(content) and not any(
        _is_in(part, text, start) for part in (content, answer) if part
    )
    if is_unsaid and not message.get("tool_calls"):
        raise UserError(
            f"{where} has a 'content' of which nothing is in the chat template's text "
            f"({_shown(said)}): the model would learn to say nothing; use another "
            "model.chat_template, or leave the row out"
        )
    # Texts may name the tools that they are about to call.
    beside = said
    for part in (content, reasoning) if content in said else (reasoning, answer):
        beside = beside.replace(part, "", 1)
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


def behind_reasoning(message: Message, text: str, start: int) -> int:
    """Where an answer begins in a turn that begins at `start`: behind its reasoning, if any, and
    what the template writes around that."""
    reasoning, answer = reasoning_of(message), answer_of(message)
    place = text.find(reasoning, _from(start, reasoning)) if reasoning else -1
    behind = place + len(reasoning) if place >= 0 else start
    begins = text.find(answer, behind) if answer else -1
    if answer and begins < 0:  # what was found is of the answer
        place, behind, begins = -1, start, text.find(answer, start)
    mark = text.find(END_OF_REASONING, behind, begins if begins >= 0 else len(text))
    if begins >= 0:
        return begins if place >= 0 or mark >= 0 else start
    return mark + len(END_OF_REASONING) if mark >= 0 else behind


def _stands(message: Message, text: str) -> bool:
    """Whether a text has something of a message that is not trained; what tools answer may be
    written anew."""
    content = message["content"].strip()
    if message["role"] == "tool":
        return not content or any(word in text for word in WORD.findall(content))
    return not content or _is_in(content, text, 0)


def _is_in(part: str, text: str, start: int) -> bool:
    """Whether a text stands in another from `start` on, perhaps shortened at one end."""
    length = min(RECOGNISED, (len(part) + 1) // 2)
    ends = part[:length], part[-length:]
    return any(text.find(end, _from(start, end)) >= 0 for end in ends)


def _from(start: int, part: str) -> int:
    """From where a text is looked for that reaches beyond `start`: what asks for an answer may be
    its beginning (`<think>`)."""
    return max(0, start - len(part) + 1)


def _other_opening(asked: str, text: str, index: int, message: Message) -> str:
    """Why an answer cannot be trained that does not stand behind what asks for it."""
    same = _alike(asked, text)
    fix = (
        "set model.chat_template_kwargs so that both are the same (for many reasoning models "
        "{enable_thinking: false}), put the reasoning into the row, or use another "
        "model.chat_template"
    )
    if reasoning_of(message):
        fix = (
            "it does not write the row's reasoning so: set model.chat_template to one that does, "
            "or model.chat_template_kwargs (for many reasoning models {enable_thinking: true} or "
            "false)"
        )
    return (
        f"inference would begin message {index + 1} behind {_shown(asked[same:])}, but the chat "
        f"template writes {_shown(text[same:])} there; {fix}"
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


def _behind_empty(asked: str, text: str) -> str | None:
    """What asks for an answer with the answer behind it, where that ends in empty reasoning that
    the template does not write before an answer. None where it is not so."""
    empty = EMPTY_REASONING.search(asked)
    if empty is None or not text.startswith(asked[: empty.start()]):
        return None
    answer = text[empty.start() :]
    opening = re.match(r"<[^>]*>", empty[0])
    assert opening is not None, "EMPTY_REASONING begins so"
    return None if answer.lstrip().startswith(opening[0]) else asked + answer


def _alike(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    places = range(1, min(len(first), len(second)) + 1)
    return bisect.bisect_left(places, 1, key=lambda end: not first.startswith(second[:end]))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def training_template(tokenizer: PreTrainedTokenizerBase, rules: ChatRules) -> str | None:
    """The name of the shipped template that takes the place of the tokenizer's own in training:
    where that leaves out the reasoning of an answer, the one that keeps it and asks for answers in
    the same words. None where none does, or the own one is right."""
    own = Renderer(tokenizer, rules)
    if own.is_marked or own.keeps_reasoning():
        return None
    for name in training_names():
        shipped = Renderer(tokenizer, replace(rules, training_template=name))
        if own.asks_like(shipped) and shipped.keeps_reasoning():
            return name
    return None
