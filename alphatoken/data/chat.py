"""From a raw row to token ids and a response mask: true exactly on what the assistant says, its end
of turn included.

There are two ways to find the assistant's part of a chat template's text: the template's own `{%
generation %}` marks, or, without them, what the template adds when an assistant message is appended
to the conversation so far.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alphatoken.data.rows import Message, as_messages, as_prompt, has_text
from alphatoken.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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

    def encode(self, fields: dict[str, Any], where: str) -> Encoded | Skipped:
        """`where` names the row in errors."""
        ...


class Encoder:
    """Tokenises rows {"prompt", "response"} or {"messages"} for one tokenizer and length limit.

    Raises UserError, naming the row, for a wrong schema, a template that cannot render the row, or
    a response mask that is all ones or all zeros.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} has no character offsets; a fast tokenizer is needed"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so the model could never learn to stop; set "
                "eos_token"
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template: str | None = (
            tokenizer.get_chat_template() if tokenizer.chat_template else None
        )

    @property
    def identity(self) -> str:
        return json.dumps(
            {
                "tokenizer": self._tokenizer.backend_tokenizer.to_str(),
                "template": self._template,
                "eos": self._tokenizer.eos_token_id,
                "max_length": self._max_length,
            }
        )

    def encode(self, fields: dict[str, Any], where: str) -> Encoded | Skipped:
        """Encodes one row, cut on the right to `max_length`, or says why it is skipped.

        Raises UserError naming `where` for a row without the fields of a schema, or one whose
        response cannot be told from its prompt.
        """
        messages = as_messages(fields, where)
        if not has_text(messages, "assistant"):
            return Skipped("empty response")
        ids, mask = self.encode_conversation(messages, where)
        cut = ("rows truncated",) if len(ids) > self._max_length else ()
        ids, mask = ids[: self._max_length], mask[: self._max_length]
        if not any(mask[1:]):
            return Skipped("response cut away by truncation")
        answers = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index > 0
        ]
        asked = tuple(_digest(self.prompt_text(messages[:index], where)) for index in answers)
        return Encoded((EncodedDocument(ids, mask),), asked, cut)

    def encode_conversation(
        self, messages: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        """All tokens of a conversation, and which of them the assistant says."""
        if self._template is None:
            ids, mask = self._encode_plain(messages, where)
        elif GENERATION_MARK.search(self._template):
            ids, mask = self._encode_marked(messages, where)
        else:
            ids, mask = self._encode_by_difference(messages, where)
        if all(mask) or not any(mask):
            found = "every" if all(mask) else "no"
            raise UserError(
                f"{where}: the response mask marks {found} token; the prompt and the response must "
                "both be there, and the chat template must tell them apart"
            )
        return ids, mask

    def encode_answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        """All tokens of a prompt and its answer, and which of them the assistant says after the
        prompt."""
        ids, mask = self.encode_conversation([*prompt, *answer], where)
        if any(message["role"] == "assistant" for message in prompt):
            text = self._render([*prompt, *answer], where, tokenize=False)
            before: str = self._render(prompt, where, tokenize=False)
            if not text.startswith(before):
                raise UserError(
                    f"{where}: the chat template renders the prompt differently once an answer "
                    "follows, so the answer cannot be told from what the assistant said before"
                )
            earlier = _common_length(
                self._tokenizer(before, add_special_tokens=False)["input_ids"], ids
            )
            mask[:earlier] = [False] * earlier
        if not any(mask):
            raise UserError(
                f"{where}: no token of the response is its own; it is fused with the prompt"
            )
        return ids, mask

    def encode_prompt(self, messages: Sequence[Message], where: str) -> Encoded:
        """The tokens that precede an answer to `messages`; none is a response."""
        text = self.prompt_text(messages, where)
        ids = list(self._tokenizer(text, add_special_tokens=self._template is None)["input_ids"])
        if self._template is None and ids and ids[-1] == self._tokenizer.eos_token_id:
            del ids[-1]
        return Encoded((EncodedDocument(ids, [False] * len(ids)),), asked=(_digest(text),))

    def prompt_text(self, messages: Sequence[Message], where: str) -> str:
        """The text that precedes an answer to `messages`."""
        if self._template is not None:
            text: str = self._render(messages, where, tokenize=False, add_generation_prompt=True)
            return text
        if [message["role"] for message in messages] != ["user"]:
            raise UserError(
                f"{where}: conversations need a chat template, and this tokenizer has none"
            )
        prompt: str = messages[0]["content"]
        return prompt

    def _encode_plain(
        self, messages: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        """Without a template: prompt, response, EOS, with whatever the tokenizer puts in front."""
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise UserError(
                f"{where}: conversations need a chat template, and this tokenizer has none"
            )
        prompt, response = (message["content"] for message in messages)
        encoding = self._tokenizer(prompt + response, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        mask = [start >= len(prompt) and end > start for start, end in offsets]
        if ids[-1] == self._tokenizer.eos_token_id:
            mask[-1] = True
            return ids, mask
        return [*ids, self._tokenizer.eos_token_id], [*mask, True]

    def _encode_marked(
        self, messages: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        encoding = self._render(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]

    def _encode_by_difference(
        self, messages: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        text = self._render(messages, where, tokenize=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.prompt_text(messages[:index], where)
            after = self._render(messages[: index + 1], where, tokenize=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{where}: the chat template renders message {index + 1} differently once "
                    "others follow, so "
                    "the assistant's part cannot be told; add {% generation %} marks to the "
                    "template"
                )
            spans.append((len(before), len(after)))
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, mask = list(encoding["input_ids"]), [False] * len(encoding["input_ids"])
        for span_start, span_end in spans:
            inside = [
                index
                for index, (start, end) in enumerate(encoding["offset_mapping"])
                if span_start <= start < end <= span_end
            ]
            for index in inside[: self._turn_length([ids[index] for index in inside])]:
                mask[index] = True
        return ids, mask

    def _turn_length(self, ids: list[int]) -> int:
        """Tokens of a turn up to its end-of-turn token; the white space that templates put behind
        it is not spoken."""
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        ends = [index for index, token in enumerate(ids) if token in special]
        if ends and not self._tokenizer.decode(ids[ends[-1] + 1 :]).strip():
            return ends[-1] + 1
        return len(ids)

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), **options)
        except TemplateError as error:
            raise UserError(
                f"{where}: the chat template refuses this conversation: {error}"
            ) from None


class PromptEncoder:
    """Tokenises what a model is asked: the prompt of rows {"prompt", ...}, or {"messages"} without
    a final answer.

    No token is a response. Prompts longer than `max_tokens` are skipped: cut ones would lose the
    question or the template's marks. Raises UserError, naming the row, for a wrong schema.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._encoder = Encoder(tokenizer, max_tokens)
        self._max_tokens = max_tokens

    @property
    def identity(self) -> str:
        return f"prompts {self._encoder.identity}"

    def encode(self, fields: dict[str, Any], where: str) -> Encoded | Skipped:
        messages = as_prompt(fields, where)
        if not has_text(messages):
            return Skipped("empty prompt")
        encoded = self._encoder.encode_prompt(messages, where)
        if len(encoded.documents[0].input_ids) > self._max_tokens:
            return Skipped(f"prompt over {self._max_tokens} tokens")
        return encoded


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(
        (index for index, (one, other) in pairs if one != other), min(len(first), len(second))
    )


def _digest(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True
    )


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer and its chat template."""
    return hashlib.sha256(PromptEncoder(tokenizer, 0).identity.encode()).hexdigest()
