"""From a raw row to token ids and a response mask: true exactly on what the assistant says, its end
of turn included. Which characters those are is decided in `turns`; here they become tokens.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from alphatoken.data.chat_template import ChatRules, Span
from alphatoken.data.rows import (
    Chat,
    Message,
    as_chat,
    as_prompt,
    as_tokens,
    has_text,
    is_tokenised,
)
from alphatoken.data.said import behind_reasoning
from alphatoken.data.turns import Renderer, Rendering
from alphatoken.errors import UserError


@dataclass(frozen=True)
class EncodedDocument:
    """Tokens the model sees together. `response_mask[i]`: whether token i is a response token."""

    input_ids: list[int]
    response_mask: list[bool]


@dataclass(frozen=True)
class Encoded:
    """One tokenised row."""

    documents: tuple[EncodedDocument, ...]
    """One; or those of a pair's chosen and rejected response, each with the prompt."""
    asked: tuple[int, ...]
    """A 64-bit hash of the text that precedes each answer: what the model is asked for it."""
    cut: tuple[str, ...] = ()
    """What was cut to the limit of length."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the row, for counting."""


@dataclass(frozen=True)
class Skipped:
    """A row that is left out, and why: `empty response` or `response cut away by truncation`."""

    reason: str


class RowEncoder(Protocol):
    """How a source's rows become tokens."""

    @property
    def identity(self) -> str:
        """Everything that decides how a row is tokenised, as text."""
        ...

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """The rows that a raw row becomes, at least one; `where` names it in errors."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Tokens of a conversation, or of its beginning, and which of them are trained."""

    rendering: Rendering
    ids: list[int]
    offsets: list[Span]
    """First character of each token in the rendering's text, and the first behind it; a token that
    stands for nothing in it is of length 0."""
    mask: list[bool]


class Encoder:
    """Tokenises rows {"prompt", "response"} or {"messages", "tools"} for one tokenizer and length
    limit.

    Raises UserError, naming the row, for a wrong schema, a template that cannot render the row, or
    a response mask that is all ones or all zeros.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        rules: ChatRules = ChatRules(),  # noqa: B008  it is frozen
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} has no character offsets; a fast tokenizer is needed"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so the model could never learn to stop; set "
                "eos_token"
            )
        self.rules = rules
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._renderer = Renderer(tokenizer, rules) if tokenizer.chat_template else None

    def as_rendered(self, chat: Chat) -> tuple[Chat, str | None]:
        """A conversation as the chat template gets it, and that template; None without one."""
        if self._renderer is None:
            return chat, None
        return self._renderer.template.as_read(chat), self._renderer.template.source_for(chat)

    @property
    def rule(self) -> str:
        """What decides which tokens are trained, in a sentence."""
        names = self._tokenizer.convert_ids_to_tokens(
            sorted({self._tokenizer.eos_token_id, *self.rules.stop_tokens})
        )
        if self._renderer is None:
            said = f"without a chat template, a row's response and the EOS token ({names[0]})"
        elif self._renderer.template.is_marked:
            said = "what the chat template's own {% generation %} marks hold of an answer"
        else:
            said = (
                "an answer from behind the text that asks for it (add_generation_prompt) to the "
                f"first stop token ({', '.join(names)})"
            )
        if self.rules.training_template is not None:
            said += (
                f", rendered with the shipped template {self.rules.training_template} where a row "
                "has no tools: it asks as the model's own and keeps the reasoning that this leaves "
                "out (exports have the model's own)"
            )
        last = ", of the last turn only" if self.rules.turns == "last" else ""
        return said + last + ("" if self.rules.train_reasoning else ", without its reasoning")

    @property
    def identity(self) -> str:
        """Everything that decides how a row is tokenised, as text."""
        return json.dumps(
            {
                **({} if self.rules.train_reasoning else {"train_reasoning": False}),
                "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
                "template": self._renderer.identity if self._renderer else None,
                "eos": self._tokenizer.eos_token_id,
                "max_length": self._max_length,
            }
        )

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """Encodes one row, cut on the right to `max_length`, as one or as one for each of its
        answers; or says why it is skipped.

        Raises UserError naming `where` for a row without the fields of a schema, or one whose
        response cannot be told from its prompt.
        """
        if is_tokenised(fields):
            tokens = self._ready_tokens(fields, where)
        else:
            chat = as_chat(fields, where)
            if not has_text(chat.messages, "assistant"):
                return Skipped("empty response")
            tokens = self.tokens(chat, where)
        if not tokens:
            return Skipped("no answer to train")
        found = [each for each in map(self._cut, tokens) if each is not None]
        if not found:
            return Skipped("response cut away by truncation")
        lost = ("turns cut away by truncation",) * (len(tokens) - len(found))
        return [replace(found[0], cut=(*found[0].cut, *lost)), *found[1:]]

    def _cut(self, tokens: Tokens) -> Encoded | None:
        """A row of at most `max_length` tokens; None where no answer is left of it."""
        ids, mask = tokens.ids[: self._max_length], tokens.mask[: self._max_length]
        if not any(mask[1:]):
            return None
        cut = ("rows truncated",) if len(tokens.ids) > self._max_length else ()
        asked = tuple(_digest(text) for text in tokens.rendering.asked)
        return Encoded((EncodedDocument(ids, mask),), asked, cut, tokens.rendering.notes)

    def _ready_tokens(self, fields: dict[str, Any], where: str) -> list[Tokens]:
        """A row that comes as tokens, with its mask; none where it trains nothing."""
        ids, mask = as_tokens(fields, len(self._tokenizer), where)
        places = itertools.pairwise([False, *mask])
        starts = [place for place, (before, trained) in enumerate(places) if trained and not before]
        asked = tuple(self._tokenizer.decode(ids[:start]) for start in starts)
        rendering = Rendering("", messages=0, answers=(), spans=(), asked=asked)
        return [Tokens(rendering, ids, [], mask)] if starts else []

    def tokens(self, chat: Chat, where: str, first: int = 0) -> list[Tokens]:
        """All tokens of a conversation, and which of them the assistant says in its messages from
        `first` on: once, or once for each answer; none where no answer can be trained."""
        if self._renderer is None:
            found = [self._plain_tokens(chat, where)]
        else:
            found = [
                self._template_tokens(each)
                for each in self._renderer.renderings(chat, where, first)
            ]
        for each in found:
            if all(each.mask) or not any(each.mask):
                marked = "every" if all(each.mask) else "no"
                raise UserError(
                    f"{where}: the response mask marks {marked} token; the prompt and the response "
                    "must both be there, and the chat template must tell them apart"
                )
        return found

    def answer_tokens(self, prompt: Chat, answer: Sequence[Message], where: str) -> Tokens:
        """All tokens of a prompt and its answer, and which of them the assistant says after the
        prompt. Raises UserError where the template has no single text for an answer of several
        turns."""
        found = self.tokens(prompt.and_then(answer), where, first=len(prompt.messages))
        if len(found) != 1:
            raise UserError(
                f"{where}: the chat template writes earlier turns of the answer differently once "
                "others follow, so they have no text in common; give the last turn as the answer, "
                "and what is before it in the prompt"
                if found
                else f"{where}: nothing of the answer can be trained"
            )
        return found[0]

    def encode_prompt(self, chat: Chat, where: str) -> Encoded:
        """The tokens that precede an answer; none is a response."""
        text = self.prompt_text(chat, where)
        ids = list(self._tokenizer(text, add_special_tokens=self._renderer is None)["input_ids"])
        if self._renderer is None and ids and ids[-1] == self._tokenizer.eos_token_id:
            del ids[-1]
        return Encoded((EncodedDocument(ids, [False] * len(ids)),), asked=(_digest(text),))

    def ready_prompt(self, fields: dict[str, Any], where: str) -> Encoded:
        """The tokens that precede the last answer of a row that comes as tokens."""
        ids, mask = as_tokens(fields, len(self._tokenizer), where)
        end = len(mask) - mask[::-1].index(True) if any(mask) else len(mask)
        start = end - mask[:end][::-1].index(False) if False in mask[:end] else 0
        ids = ids[: start if any(mask) else end]
        asked = (_digest(self._tokenizer.decode(ids)),)
        return Encoded((EncodedDocument(ids, [False] * len(ids)),), asked)

    def prompt_text(self, chat: Chat, where: str) -> str:
        """The text that precedes an answer."""
        if self._renderer is not None:
            return self._renderer.prompt(chat, where)
        if [message["role"] for message in chat.messages] != ["user"]:
            raise _needs_template(where)
        prompt: str = chat.messages[0]["content"]
        return prompt

    def _template_tokens(self, rendering: Rendering) -> Tokens:
        encoding = self._tokenizer(
            rendering.text, add_special_tokens=False, return_offsets_mapping=True
        )
        firsts = [first for first, _ in rendering.spans]
        lasts = [0, *(last for _, last in rendering.spans)]
        mask = [
            start < end <= lasts[bisect.bisect_right(firsts, start)]
            for start, end in encoding["offset_mapping"]
        ]
        return Tokens(rendering, list(encoding["input_ids"]), encoding["offset_mapping"], mask)

    def _plain_tokens(self, chat: Chat, where: str) -> Tokens:
        """Without a template: prompt, response, EOS, with whatever the tokenizer puts in front."""
        if [message["role"] for message in chat.messages] != ["user", "assistant"]:
            raise _needs_template(where)
        prompt, response = (message["content"] for message in chat.messages)
        text = prompt + response
        start = len(prompt)
        if not self.rules.train_reasoning:
            start = behind_reasoning(chat.messages[1], text, start)
        rendering = Rendering(text, 2, (1,), ((start, len(text)),), (prompt,))
        encoding = self._tokenizer(text, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        mask = [left >= start and right > left for left, right in offsets]
        if ids[-1] == self._tokenizer.eos_token_id:
            mask[-1] = True
            return Tokens(rendering, ids, offsets, mask)
        end_of_turn = self._tokenizer.eos_token_id
        return Tokens(
            rendering, [*ids, end_of_turn], [*offsets, (len(text), len(text))], [*mask, True]
        )


class PromptEncoder:
    """Tokenises what a model is asked: the prompt of rows {"prompt", ...}, or {"messages"} without
    a final answer.

    No token is a response. Prompts longer than `max_tokens` are skipped: cut ones would lose the
    question or the template's marks. Raises UserError, naming the row, for a wrong schema.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        rules: ChatRules = ChatRules(),  # noqa: B008  it is frozen
    ) -> None:
        self._encoder = Encoder(tokenizer, max_tokens, rules)
        self._max_tokens = max_tokens

    @property
    def identity(self) -> str:
        return f"prompts {self._encoder.identity}"

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """Encodes what a row asks, or says why it is skipped.

        Raises UserError naming `where` for a row that asks nothing.
        """
        if is_tokenised(fields):
            encoded = self._encoder.ready_prompt(fields, where)
        else:
            chat = as_prompt(fields, where)
            if not has_text(chat.messages):
                return Skipped("empty prompt")
            encoded = self._encoder.encode_prompt(chat, where)
        if len(encoded.documents[0].input_ids) > self._max_tokens:
            return Skipped(f"prompt over {self._max_tokens} tokens")
        return [encoded]


def _needs_template(where: str) -> UserError:
    return UserError(f"{where}: conversations need a chat template, and this tokenizer has none")


def _digest(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True
    )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer and its chat template."""
    return hashlib.sha256(PromptEncoder(tokenizer, 0).identity.encode()).hexdigest()
