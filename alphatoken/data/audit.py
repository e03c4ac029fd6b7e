"""Whether what is trained is what the assistant says: an account of each token of a conversation,
made without the code that makes the response mask (`layout`). Every run looks at its first rows so,
and doctor at a probe besides."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source
from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.chat_template import Span
from alphatoken.data.layout import Conversation, Layout, lay_out
from alphatoken.data.preview import marked
from alphatoken.data.rows import (
    Chat,
    Message,
    answer_of,
    as_chat,
    as_pair,
    has_text,
    is_tokenised,
    named,
    reasoning_of,
)
from alphatoken.data.said import UNSAID_REASONING, UNSAID_TEXT
from alphatoken.data.sources import OpenSource, location
from alphatoken.data.tokenizer import chat_rules
from alphatoken.data.turns import OTHER_OPENING, UNSAID_MESSAGE, UNSAID_TOOLS
from alphatoken.errors import UserError
from alphatoken.util.wording import plural

# Words that occur in no template, each in one turn only.
PROBE: tuple[Message, ...] = (
    {"role": "system", "content": "Quartz governs umbrellas."},
    {"role": "user", "content": "Which walrus juggles?"},
    {"role": "assistant", "content": "Velvet pigeons do, mostly."},
    {"role": "user", "content": "And tuba gherkins?"},
    {"role": "assistant", "content": "Only foxes yodel."},
)
LOOKED_AT = 32  # rows of the data
MOST_READ = 1000  # rows of a source, of which there may be none with text
MOST_RENDERED = 2_000_000  # characters of them, each as often as there are answers behind: seconds

Severity = Literal["notable", "wrong", "grave"]
"""Of what is left out of a text; of a mask; of text that the assistant never says and that is
trained."""
MARKS = (
    "put {% generation %} around what the assistant says in the chat template, or take it off the "
    "rest"
)
HEADER = (
    "write that where the chat template has add_generation_prompt, and take {% generation %} off it"
)
STOPS = (
    "without it the model never learns to stop: set model.chat_template to one that writes it "
    "behind every answer, or correct eos_token_id of the model"
)
ANOTHER = "set model.chat_template to one that writes it"
LEFT_OUT = {
    UNSAID_REASONING: f"{ANOTHER}, or take it out of the rows",
    UNSAID_TEXT: ANOTHER,
    UNSAID_TOOLS: ANOTHER,
    UNSAID_MESSAGE: ANOTHER,
    OTHER_OPENING: "correct the marks of the chat template, or take them out",
}
"""Notes on a row that change what is learned of it, and what to do."""


@dataclass(frozen=True)
class Complaint:
    """Something wrong with a row."""

    what: str
    said: str
    """The text that it is about; empty where it is about the row."""
    where: str
    """The row."""
    fix: str
    severity: Severity = "wrong"

    def __str__(self) -> str:
        return f"{clipped(self.said, 60)!r} ({self.where})" if self.said else self.where


@dataclass(frozen=True)
class Account:
    """What the mask of a conversation does wrong, and the whole text with [[ ]] around what is
    trained."""

    complaints: tuple[Complaint, ...]
    shown: str


@dataclass(frozen=True)
class Audit:
    """The accounts of several conversations."""

    known: tuple[tuple[Conversation, list[Account]], ...]
    unknown: int
    """How many of them have messages that cannot be found in the template's text."""
    refused: tuple[Complaint, ...]
    """Those that cannot be encoded."""

    def complaints(self) -> dict[str, list[Complaint]]:
        """By what is wrong."""
        found: dict[str, list[Complaint]] = {}
        accounts = itertools.chain.from_iterable(accounts for _, accounts in self.known)
        for each in (*self.refused, *(one for account in accounts for one in account.complaints)):
            found.setdefault(each.what, []).append(each)
        return found


def look_at_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Looks at the first rows of a run's training data. What the user should know, in lines: by
    which rule tokens are trained, and a warning for each kind of fault, with a row and the fix.

    Raises UserError where text of others than the assistant is trained.
    """
    encoder = Encoder(tokenizer, config.data.max_length, chat_rules(config, tokenizer))
    found = audit(tokenizer, encoder, real_conversations(config))
    lines = [f"what is trained: {encoder.rule}"]
    for what, complaints in found.complaints().items():
        first = complaints[0]
        text = f"{what}: {first}{and_more(complaints)}; {first.fix}"
        if first.severity == "grave":
            raise UserError(text)
        lines.append(f"warning: {text}")
    return lines


def audit(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversations: Sequence[Conversation]
) -> Audit:
    """Checks the masks that `encoder` gives conversations."""
    known, refused, unknown = [], [], 0
    for each in conversations:
        try:
            found = accounts(tokenizer, encoder, each)
        except UserError as error:
            refused.append(Complaint("cannot be encoded", "", str(error), "do as it says there"))
            continue
        if found is None:
            unknown += 1
        else:
            known.append((each, found))
    return Audit(tuple(known), unknown, tuple(refused))


def real_conversations(config: RunConfig, limit: int = LOOKED_AT) -> list[Conversation]:
    """Reads the first usable rows of every training source, about `limit` in all and fewer of very
    long ones, both answers of a pair.

    Raises UserError for bad rows.
    """
    sources = config.data.train
    share, most = max(1, limit // len(sources)), MOST_RENDERED // len(sources)
    pairs = isinstance(config, PreferenceRunConfig)
    found = []
    for source in sources:
        rendered = 0
        for each in itertools.islice(_conversations(source, pairs=pairs), share):
            found.append(each)
            rendered += each.rendered_characters()
            if rendered > most:
                break
    return found


def _conversations(source: Source, *, pairs: bool) -> Iterator[Conversation]:
    for row in OpenSource(source).read(end=MOST_READ):
        where = location(source, row.number)
        with named(where):
            found = list(_told(row.fields, where, pairs=pairs))
        yield from found


def _told(fields: dict[str, Any], where: str, *, pairs: bool) -> Iterator[Conversation]:
    """The conversations of a row, of a pair both; none of one without an answer or text."""
    if pairs:
        pair = as_pair(fields, where)
        for answer in (pair.chosen, pair.rejected):
            if has_text(pair.prompt.messages) and has_text(answer, "assistant"):
                first = len(pair.prompt.messages)
                yield Conversation(pair.prompt.and_then(answer), first, where)
    elif not is_tokenised(fields):
        chat = as_chat(fields, where)
        if has_text(chat.messages, "assistant"):
            yield Conversation(chat, 0, where)


def probe(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> Conversation:
    """The longest part of PROBE that can be encoded: all, without the system message, or one
    question and answer.

    Some templates take no system message; some cannot tell earlier answers apart, which rows of one
    answer do not need. Raises UserError where not even those can be encoded.
    """
    for messages in (PROBE, PROBE[1:], PROBE[1:3]):
        conversation = Conversation(Chat(list(messages)), 0, "the probe")
        try:
            accounts(tokenizer, encoder, conversation)
        except UserError as error:
            refused = error
            continue
        return conversation
    raise refused


def accounts(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation
) -> list[Account] | None:
    """Checks the masks that `encoder` gives the rows of a conversation. None where messages cannot
    be found in the template's text.

    Raises UserError where the conversation cannot be encoded.
    """
    if encoder.rules.turns == "last":
        answers = filter(conversation.is_trained, range(len(conversation.chat.messages)))
        conversation = Conversation(conversation.chat, max(answers, default=0), conversation.where)
    chat, first = conversation.chat, conversation.answered_from
    found = encoder.tokens(chat, conversation.where, first)
    parts = conversation.parts([tokens.rendering.messages for tokens in found])
    checked = [
        _account(tokenizer, encoder, part, tokens)
        for part, tokens in zip(parts, found, strict=False)
    ]
    known = [each for each in checked if each is not None]
    return known if len(known) == len(checked) else None


def ending(
    ids: Sequence[int], span: Span, stops: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What is wrong with the end of an answer whose tokens [first, last) are trained; None where it
    ends with a token at which generation stops."""
    _, behind = span
    if ids[last_said(ids, span, stops, tokenizer)] in stops:
        return None
    if behind < len(ids) and ids[behind] in stops:
        token = tokenizer.convert_ids_to_tokens(ids[behind])
        return f"the end-of-turn token {token} is not trained"
    wanted = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stops)))
    return f"the last token trained is no token at which generation stops ({wanted})"


def last_said(
    ids: Sequence[int], span: Span, stops: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> int:
    """The last place of an answer, without a line break that a template puts behind the end of a
    turn."""
    first, behind = span
    last = behind - 1
    while last > first and ids[last] not in stops and not tokenizer.decode([ids[last]]).strip():
        last -= 1
    return last


def clipped(text: str, length: int = 1200) -> str:
    """A text without its middle, where it is long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def and_more(places: Sequence[object]) -> str:
    """How many places there are besides the first."""
    return f" and {plural(len(places) - 1, 'more place')}" if len(places) > 1 else ""


def _account(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, tokens: Tokens
) -> Account | None:
    layout = lay_out(tokenizer, encoder, conversation, tokens)
    if layout is None:
        return None
    where = conversation.where
    left_out = (
        Complaint(note, "", where, LEFT_OUT[note], "notable")
        for note in tokens.rendering.notes
        if note in LEFT_OUT
    )
    complaints = (
        *_foreign(tokenizer, encoder, layout),
        *_lacking(tokenizer, encoder, layout),
        *_unended(tokenizer, encoder, layout),
        *left_out,
    )
    return Account(complaints, marked(layout.ids, layout.mask, tokenizer).plain)


def _foreign(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, layout: Layout
) -> Iterator[Complaint]:
    """What is trained, although it is somebody else's or the template's own."""
    conversation = layout.conversation
    allowed = _template_text_of_answers(layout, tokenizer, encoder)
    places: dict[str, list[int]] = {}
    for place, trained in enumerate(layout.mask):
        owner = layout.owner(place)
        if not trained:
            continue
        if owner is None:
            if place not in allowed and tokenizer.decode([layout.ids[place]]).strip():
                places.setdefault("template", []).append(place)
        elif not conversation.is_trained(owner):
            places.setdefault(conversation.speaker(owner), []).append(place)
    for whose, trained_places in places.items():
        by_template = whose == "template"
        for text in _runs(tokenizer, layout.ids, trained_places):
            yield Complaint(
                f"trains on text of the {whose}",
                text,
                conversation.where,
                f"{MARKS}; a header: {HEADER}" if by_template else MARKS,
                "wrong" if by_template else "grave",
            )


def _lacking(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, layout: Layout
) -> Iterator[Complaint]:
    """What the assistant says that is not trained."""
    conversation = layout.conversation
    places = []
    for place, trained in enumerate(layout.mask):
        owner = layout.owner(place)
        if trained or owner is None or not conversation.is_trained(owner):
            continue
        # A first token that the tokenizer has fused with what precedes it is not the answer's own,
        # and neither is what inference gives it (`<think>`).
        start, end = layout.span(owner)
        if not encoder.rules.train_reasoning:
            answer = answer_of(conversation.chat.messages[owner])
            start = max(start, layout.text.rfind(answer, start, end))
        if layout.offsets[place][0] >= max(start, layout.starts[owner]):
            places.append(place)
    for text in _runs(tokenizer, layout.ids, places):
        what = "does not train on text of the assistant"
        yield Complaint(what, text, conversation.where, MARKS)
    for index in layout.starts:
        calls = conversation.chat.messages[index].get("tool_calls") or []
        trained_ids = [layout.ids[place] for place in _trained(layout, index)]
        said = tokenizer.decode(trained_ids) if calls else ""
        for name in (call["function"]["name"] for call in calls):
            if name not in said:
                what = "does not train on tool calls of the assistant"
                yield Complaint(what, name, conversation.where, MARKS)


def _unended(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, layout: Layout
) -> Iterator[Complaint]:
    """Answers that do not end with a token that stops."""
    stops = {tokenizer.eos_token_id, *encoder.rules.stop_tokens}
    for index in layout.starts:
        if places := _trained(layout, index):
            problem = ending(layout.ids, (places[0], places[-1] + 1), stops, tokenizer)
            if problem is not None:
                text = tokenizer.decode([layout.ids[place] for place in places])
                yield Complaint(problem, text, layout.conversation.where, STOPS)


def _trained(layout: Layout, index: int) -> list[int]:
    """The trained tokens of a message."""
    first, limit = min(layout.starts[index], layout.span(index)[0]), layout.limit(index)
    return [
        place
        for place, trained in enumerate(layout.mask)
        if trained and first <= layout.offsets[place][0] < limit
    ]


def _template_text_of_answers(
    layout: Layout, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> set[int]:
    """Places of tokens that the template says for the assistant: behind what asks for an answer,
    and up to the end of turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    stops = {tokenizer.eos_token_id, *encoder.rules.stop_tokens}
    allowed = set[int]()
    for index in layout.starts:
        allowed |= _opening(layout, index)
        (_, end), limit = layout.span(index), layout.limit(index)
        behind = [place for place, (left, _) in enumerate(layout.offsets) if end <= left < limit]
        # Calls stand behind the content, with marks of their own.
        calls = layout.conversation.chat.messages[index].get("tool_calls")
        ends = [layout.ids[place] in (stops if calls else special) for place in behind]
        closing = ends.index(True) if True in ends else len(behind)
        allowed.update(behind[:closing])
        for place in behind[closing:]:
            if layout.ids[place] not in special:
                break
            allowed.add(place)  # several end a turn together where they stand side by side
            if layout.ids[place] in stops:
                break
    return allowed


def _opening(layout: Layout, index: int) -> set[int]:
    """Places of the template's tokens between what asks for message `index` and its content. Where
    nothing asks, only reasoning may stand there: anything else is a header."""
    given, (start, _) = layout.starts[index], layout.span(index)
    if not given or (
        index in layout.unasked and not reasoning_of(layout.conversation.chat.messages[index])
    ):
        return set()
    return {
        place
        for place, (left, right) in enumerate(layout.offsets)
        if given <= left < right <= start
    }


def _runs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], places: Sequence[int]
) -> Iterator[str]:
    """Neighbouring places as text."""
    for _, group in itertools.groupby(enumerate(places), key=lambda each: each[1] - each[0]):
        yield tokenizer.decode([ids[place] for _, place in group])
