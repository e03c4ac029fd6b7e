"""From a pair of answers to tokens: the prompt with the chosen one, then the prompt with the
rejected one."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from alphatoken.data.chat import Encoded, EncodedDocument, Encoder, Skipped
from alphatoken.data.chat_template import ChatRules
from alphatoken.data.rows import Chat, Message, as_pair, has_text
from alphatoken.errors import UserError


class PairEncoder:
    """Tokenises rows {"prompt", "chosen", "rejected"}; both documents of a pair make up one row.

    A longer prompt loses its beginning (but for a BOS token), a longer response its end. Pairs
    without a difference and those with an empty part are skipped. Raises UserError, naming the row,
    for a wrong schema.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        max_response_tokens: int,
        rules: ChatRules = ChatRules(),  # noqa: B008  it is frozen
    ) -> None:
        self._encoder = Encoder(tokenizer, max_prompt_tokens + max_response_tokens, rules)
        self._bos = tokenizer.bos_token_id
        self._max_prompt = max_prompt_tokens
        self._max_response = max_response_tokens

    @property
    def identity(self) -> str:
        lengths = {"max_prompt_tokens": self._max_prompt, "max_response_tokens": self._max_response}
        return json.dumps({**json.loads(self._encoder.identity), **lengths})

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """Encodes both responses of a pair as two documents, or says why the pair is skipped.

        Raises UserError naming `where` for a row that is no pair.
        """
        pair = as_pair(fields, where)
        if not has_text(pair.prompt.messages):
            return Skipped("empty prompt")
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not has_text(answer, "assistant"):
                return Skipped(f"empty {name} response")
        if pair.chosen == pair.rejected:
            return Skipped("chosen and rejected are the same")
        chosen, rejected = (
            self._document(pair.prompt, answer, where) for answer in (pair.chosen, pair.rejected)
        )
        if chosen.documents[0].input_ids == rejected.documents[0].input_ids:
            return Skipped(f"chosen and rejected are the same within {self._max_response} tokens")
        return [
            Encoded(
                documents=(*chosen.documents, *rejected.documents),
                asked=chosen.asked,
                cut=tuple(sorted({*chosen.cut, *rejected.cut})),
                notes=tuple(sorted({*chosen.notes, *rejected.notes})),
            )
        ]

    def encode_chosen(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """The chosen response alone, as an example to learn from."""
        pair = as_pair(fields, where)
        if not (has_text(pair.prompt.messages) and has_text(pair.chosen, "assistant")):
            return Skipped("empty prompt or chosen response")
        return [self._document(pair.prompt, pair.chosen, where)]

    def _document(self, prompt: Chat, answer: list[Message], where: str) -> Encoded:
        asked = self._encoder.encode_prompt(prompt, where)
        tokens = self._encoder.answer_tokens(prompt, answer, where)
        ids, mask = tokens.ids, tokens.mask
        start = mask.index(True)
        cut = []
        prompt_ids, response_ids = ids[:start], ids[start:]
        if len(prompt_ids) > self._max_prompt:
            cut.append("prompts cut on the left")
            has_bos = prompt_ids[0] == self._bos
            prompt_ids = prompt_ids[:has_bos] + prompt_ids[start - self._max_prompt + has_bos :]
        if len(response_ids) > self._max_response:
            cut.append("responses cut on the right")
        response_ids = response_ids[: self._max_response]
        document = EncodedDocument(
            input_ids=prompt_ids + response_ids,
            response_mask=[False] * len(prompt_ids) + mask[start : start + len(response_ids)],
        )
        return Encoded((document,), asked.asked, tuple(cut), tokens.rendering.notes)


class HeldOutPairEncoder(PairEncoder):
    """Tokenises held-out rows that are compared as pairs (`valuation.target: preference`)."""

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        """Encodes a pair as `PairEncoder` does. Raises UserError for a supervised row, with what to
        change."""
        if "chosen" not in fields:
            raise UserError(
                f"{where}: valuation.target=preference compares held-out pairs, but this row of "
                f"data.validation has {', '.join(sorted(fields))}; give it rows with 'prompt', "
                "'chosen' and 'rejected', or set valuation.target=sft"
            )
        return super().encode(fields, where)


class ChosenEncoder:
    """Tokenises supervised examples of a preference run: the chosen responses of pairs, or ordinary
    supervised rows."""

    def __init__(self, pairs: PairEncoder, examples: Encoder) -> None:
        self._pairs = pairs
        self._examples = examples

    @property
    def identity(self) -> str:
        return f"chosen of {self._pairs.identity}, else {self._examples.identity}"

    def encode(self, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        if "chosen" in fields:
            return self._pairs.encode_chosen(fields, where)
        return self._examples.encode(fields, where)
