"""Where messages and tokens lie in a chat template's text, found without the code that makes the
response mask.

The template is rendered once more with messages replaced by marks. What stands between the marks is
the template's own text, and tells where each message lies in a real conversation, whatever it says.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.chat_template import Span
from alphatoken.data.rows import (
    END_OF_REASONING,
    Chat,
    asks_anything,
    is_trained,
    says_anything,
)


@dataclass(frozen=True)
class Conversation:
    """A row's messages, and from which on the assistant's are trained: those of a pair's prompt are
    not."""

    chat: Chat
    answered_from: int
    where: str

    def is_trained(self, index: int) -> bool:
        message = self.chat.messages[index]
        return (
            index >= self.answered_from
            and message["role"] == "assistant"
            and is_trained(message)
            and says_anything(message)
            and asks_anything(self.chat.messages[:index])
        )

    def speaker(self, index: int) -> str:
        """Whose text a message is, in reports."""
        role: str = self.chat.messages[index]["role"]
        return role if index >= self.answered_from else "prompt"

    def rendered_characters(self) -> int:
        """Characters of its messages, as often as an answer may have to be rendered behind them."""
        places = range(len(self.chat.messages))
        answers = sum(map(self.is_trained, places))
        return answers * sum(len(message["content"]) for message in self.chat.messages)

    def parts(self, counts: Sequence[int]) -> list[Conversation]:
        """The conversation; or, where its turns become rows of their own, its first messages, so
        many of them each, of which the last is trained."""
        if list(counts) == [len(self.chat.messages)]:
            return [self]
        return [Conversation(self.chat.first(count), count - 1, self.where) for count in counts]


@dataclass(frozen=True)
class Layout:
    """Where the messages and the tokens of a conversation lie in the template's text."""

    conversation: Conversation
    text: str
    pieces: list[tuple[int, Span]]
    """A message, and first and last character of its content, in the order of the text: none of a
    message that says nothing, or that the template leaves out or rewrites."""
    ids: list[int]
    offsets: list[Span]
    """First and last character of each token."""
    mask: list[bool]
    """Which tokens are trained."""
    starts: dict[int, int]
    """Of each trained message: characters of the text before it, which ask for it."""
    unasked: frozenset[int]
    """Trained messages that the template does not ask for: with `add_generation_prompt` it writes
    the same as without."""

    def owner(self, place: int) -> int | None:
        """The message that a token belongs to, by most of its characters; None: the template's own
        text."""
        left, right = self.offsets[place]
        last = bisect.bisect_left(self.pieces, right, key=lambda piece: piece[1][0])
        first = bisect.bisect_right(self.pieces, left, hi=last, key=lambda piece: piece[1][1])
        shares = [
            (min(right, end) - max(left, start), index)
            for index, (start, end) in self.pieces[first:last]
        ]
        most = max(shares, default=(0, 0))
        return most[1] if most[0] > 0 else None

    def span(self, index: int) -> Span:
        """The content of a trained message; where it begins, for one that only calls."""
        start = self.starts[index]
        return next((span for each, span in self.pieces if each == index), (start, start))

    def limit(self, index: int) -> int:
        """Where the text behind a trained message belongs to another one at the latest."""
        _, end = self.span(index)
        begin = [*(start for _, (start, _) in self.pieces), *self.starts.values()]
        return min((start for start in begin if start > end), default=len(self.text) + 1)


def lay_out(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, tokens: Tokens
) -> Layout | None:
    """Finds messages and tokens in the template's text, rendered anew; None where that is not
    possible."""
    text = _text(tokenizer, encoder, conversation.chat)
    pieces = _pieces(tokenizer, encoder, conversation, text)
    seen = tokens.rendering.text
    if seen.startswith(text):
        text = seen  # with what ends the last turn
    elif pieces is not None:
        before = conversation.chat.first(len(conversation.chat.messages) - 1)
        pieces = _moved(pieces, text, seen, encoder.prompt_text(before, conversation.where))
        text = seen
    encoding = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True
    )
    ids, offsets = tokens.ids, list(encoding["offset_mapping"])
    # The EOS that a row without template gets stands behind the text.
    offsets += [(len(text), len(text))] * (len(ids) - len(offsets))
    if pieces is None or list(encoding["input_ids"]) != ids[: len(encoding["input_ids"])]:
        return None
    starts, unasked = {}, set()
    for index in filter(conversation.is_trained, range(len(conversation.chat.messages))):
        before = conversation.chat.first(index)
        asked = encoder.prompt_text(before, conversation.where)
        if text.startswith(asked):
            starts[index] = len(asked)
            if tokenizer.chat_template and asked == _text(tokenizer, encoder, before):
                unasked.add(index)
        elif any(index == each for each, _ in pieces):
            starts[index] = 0
        elif tokenizer.chat_template and text.startswith(
            plain := _text(tokenizer, encoder, before)
        ):
            starts[index] = len(plain)
        else:
            return None
    return Layout(
        conversation=conversation,
        text=text,
        pieces=pieces,
        ids=ids,
        offsets=offsets,
        mask=tokens.mask,
        starts=starts,
        unasked=frozenset(unasked),
    )


def _moved(
    pieces: list[tuple[int, Span]], text: str, seen: str, asked: str
) -> list[tuple[int, Span]] | None:
    """The pieces of an answer in a text that begins with what asks for it, where the template
    writes something else before an answer that is there (a system text that moves). None where it
    is something else again."""
    answer = seen[len(asked) :]
    if not seen.startswith(asked) or not text.endswith(answer):
        return None
    by = len(seen) - len(text)
    moved = [(index, (start + by, end + by)) for index, (start, end) in pieces]
    return [(index, span) for index, span in moved if span[0] >= len(asked)]


def _text(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, chat: Chat) -> str:
    if tokenizer.chat_template is None:
        return "".join(message["content"] for message in chat.messages)
    chat, template = encoder.as_rendered(chat)
    text: str = tokenizer.apply_chat_template(
        chat.messages,
        tools=chat.tools,
        tokenize=False,
        chat_template=template,
        **encoder.rules.variables,
    )
    return text


def _pieces(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, text: str
) -> list[tuple[int, Span]] | None:
    """Where each message's content lies in `text`. Where the template rewrites some: the trained
    ones alone, and of a text that begins with its reasoning what is behind it. None where it
    rewrites that, too."""
    places = range(len(conversation.chat.messages))
    trained = list(filter(conversation.is_trained, places))
    for sought, behind in itertools.product((places, trained), (False, True)):
        found = _pieces_of(sought, tokenizer, encoder, conversation.chat, text, behind=behind)
        if found is not None:
            return found
    return None


def _pieces_of(
    sought: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    chat: Chat,
    text: str,
    *,
    behind: bool,
) -> list[tuple[int, Span]] | None:
    """Where the content of some messages lies in `text`, with `behind` what follows its reasoning.
    None where the template does more than to put text around it."""
    said, marked = {}, list(chat.messages)
    for index in sought:
        content = chat.messages[index]["content"]
        kept = content[: content.rfind(END_OF_REASONING) + len(END_OF_REASONING)]
        kept = kept if behind and END_OF_REASONING in content else ""
        if content[len(kept) :].strip():
            said[index] = content[len(kept) :]
            marked[index] = {**chat.messages[index], "content": f"{kept}zqj{index}vxk"}
    frame = re.split(r"zqj(\d+)vxk", _text(tokenizer, encoder, Chat(marked, chat.tools)))
    order = [int(index) for index in frame[1::2]]
    if not text.startswith(frame[0]):
        return None
    pieces: list[tuple[int, Span]] = []
    place = len(frame[0])
    for number, index in enumerate(order):
        after, is_last = frame[2 * number + 2], number + 1 == len(order)
        for trim in (str, str.strip, str.lstrip, str.rstrip):
            content = trim(said[index])
            rest = text[place + len(content) :]
            if text.startswith(content, place) and (
                rest == after if is_last else rest.startswith(after)
            ):
                break
        else:
            return None
        pieces.append((index, (place, place + len(content))))
        place += len(content) + len(after)
    return pieces if order or not said else None
