"""Where messages and tokens lie in a chat template's text, found without the code that makes the
response mask.

The template is rendered once more with messages replaced by marks. What stands between the marks is
the template's own text, and tells where each message lies in a real conversation, whatever it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.rows import Chat, asks_anything, is_trained, says_anything


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
    spans: list[tuple[int, int]]
    """First and last character of each message's content, both behind the text where a message that
    is not trained is rewritten."""
    ids: list[int]
    offsets: list[tuple[int, int]]
    """First and last character of each token."""
    mask: list[bool]
    """Which tokens are trained."""

    def owner(self, place: int) -> int | None:
        """The message that a token belongs to, by most of its characters; None: the template's own
        text."""
        left, right = self.offsets[place]
        shares = [min(right, end) - max(left, start) for start, end in self.spans]
        most = max(range(len(shares)), key=lambda index: shares[index])
        return most if shares[most] > 0 else None


def lay_out(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, tokens: Tokens
) -> Layout | None:
    """Finds messages and tokens in the template's text, rendered anew; None where that is not
    possible."""
    text = _text(tokenizer, encoder, conversation.chat)
    encoding = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True
    )
    ids, offsets = tokens.ids, list(encoding["offset_mapping"])
    # The EOS that a row without template gets stands behind the text.
    offsets += [(len(text), len(text))] * (len(ids) - len(offsets))
    spans = _spans(tokenizer, encoder, conversation, text)
    if spans is None or list(encoding["input_ids"]) != ids[: len(encoding["input_ids"])]:
        return None
    return Layout(
        conversation=conversation,
        text=text,
        spans=spans,
        ids=ids,
        offsets=offsets,
        mask=tokens.mask,
    )


def _text(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, chat: Chat) -> str:
    if tokenizer.chat_template is None:
        return "".join(message["content"] for message in chat.messages)
    text: str = tokenizer.apply_chat_template(
        chat.messages,
        tools=chat.tools,
        tokenize=False,
        chat_template=encoder.template,
        **encoder.rules.variables,
    )
    return text


def _spans(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, text: str
) -> list[tuple[int, int]] | None:
    """Where each message's content lies in `text`; behind it for one that the template rewrites,
    where nothing of that is trained. None where it rewrites what is trained."""
    places = range(len(conversation.chat.messages))
    for sought in (places, list(filter(conversation.is_trained, places))):
        found = _spans_of(sought, tokenizer, encoder, conversation.chat, text)
        if found is not None:
            return [found.get(place, (len(text) + 1, len(text) + 1)) for place in places]
    return None


def _spans_of(
    sought: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    chat: Chat,
    text: str,
) -> dict[int, tuple[int, int]] | None:
    """Where the content of some messages lies in `text`. None where the template does more than to
    put text around it."""
    marks = {index: f"zqj{index}vxk" for index in sought}
    marked = [
        {**message, "content": marks.get(index, message["content"])}
        for index, message in enumerate(chat.messages)
    ]
    frame = re.split("|".join(marks.values()), _text(tokenizer, encoder, Chat(marked, chat.tools)))
    if not marks or len(frame) != len(marks) + 1:
        return None
    for trim in (str, str.strip, str.lstrip, str.rstrip):
        contents = [trim(chat.messages[index]["content"]) for index in sought]
        if text == frame[0] + "".join(
            content + piece for content, piece in zip(contents, frame[1:], strict=True)
        ):
            break
    else:
        return None
    spans, place = {}, 0
    for index, before, content in zip(sought, frame, contents, strict=False):
        place += len(before)
        spans[index] = (place, place + len(content))
        place += len(content)
    return spans
