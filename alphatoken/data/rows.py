"""What a raw row says: a conversation, what is asked in it, or two answers to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken.errors import UserError

Message = dict[str, Any]

PAIR_FORM = (
    "a row needs 'prompt', 'chosen' and 'rejected', each a text or a list of messages; or 'chosen' "
    "and 'rejected' as conversations that begin alike"
)


@dataclass(frozen=True)
class RawPair:
    """Two ways to go on after the same messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def as_messages(fields: dict[str, Any], where: str) -> list[Message]:
    """The row as a conversation. Raises UserError naming what is wrong with it."""
    if "messages" in fields and not ("prompt" in fields or "response" in fields):
        messages = _checked("messages", fields["messages"], where)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{where}: the conversation has no message with role 'assistant' to train on"
            )
        return messages
    if "prompt" in fields and "response" in fields and "messages" not in fields:
        for key in ("prompt", "response"):
            if not isinstance(fields[key], str):
                raise UserError(f"{where}: {key!r} must be text, but is {_shortened(fields[key])}")
        return [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": fields["response"]},
        ]
    hint = "; pairs are for recipes/preference.py and configurations with a section preference"
    raise UserError(
        f"{where}: a row needs either 'prompt' and 'response', or 'messages'; this one has "
        f"{', '.join(sorted(fields))}" + (hint if "chosen" in fields else "")
    )


def as_prompt(fields: dict[str, Any], where: str) -> list[Message]:
    """The row's conversation without the answer it ends with. Raises UserError naming what is wrong
    with it."""
    if "chosen" in fields:
        return as_pair(fields, where).prompt
    if "messages" in fields and "prompt" not in fields:
        messages = _checked("messages", fields["messages"], where)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not isinstance(fields.get("prompt"), str):
        raise UserError(
            f"{where}: a row needs a text 'prompt', or 'messages'; this one is {_shortened(fields)}"
        )
    return [{"role": "user", "content": fields["prompt"]}]


def as_pair(fields: dict[str, Any], where: str) -> RawPair:
    """The row as a prompt with a chosen and a rejected answer. Raises UserError naming what is
    wrong with it.

    An answer may repeat the prompt's messages; they are taken off. Without `prompt` it is what both
    have in common.
    """
    missing = [key for key in ("chosen", "rejected") if key not in fields]
    if missing:
        raise UserError(f"{where}: {PAIR_FORM}; this one has {', '.join(sorted(fields))}")
    branches = [_turns(key, fields[key], "assistant", where) for key in ("chosen", "rejected")]
    if "prompt" in fields:
        prompt = _turns("prompt", fields["prompt"], "user", where)
    elif isinstance(fields["chosen"], list) and isinstance(fields["rejected"], list):
        prompt = _common_start(*branches)
    else:
        raise UserError(f"{where}: {PAIR_FORM}; this one has {', '.join(sorted(fields))}")
    if not prompt or prompt[-1]["role"] == "assistant":
        ends = "ends with the assistant's message" if prompt else "is empty"
        raise UserError(
            f"{where}: the prompt {ends}, so there is nothing to answer; are fields swapped?"
        )
    answers = [
        turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in branches
    ]
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            found = (
                f"begins with role {answer[0]['role']!r}"
                if answer
                else "has nothing after the prompt"
            )
            raise UserError(
                f"{where}: {key!r} must be the assistant's answer to 'prompt', but {found}; are "
                "fields swapped?"
            )
    return RawPair(prompt, *answers)


def has_text(messages: Sequence[Message], role: str | None = None) -> bool:
    """Whether anything is said, or anything by `role`."""
    return any(
        message["content"].strip() for message in messages if role in (None, message["role"])
    )


def _common_start(first: Sequence[Message], second: Sequence[Message]) -> list[Message]:
    """The messages before the first answers that differ."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return list(first[:shared])


def _turns(key: str, value: Any, role: str, where: str) -> list[Message]:
    """A text as the only message of `role`; or checked messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return _checked(key, value, where)
    raise UserError(
        f"{where}: {key!r} must be text or a list of messages, but is {_shortened(value)}"
    )


def _checked(key: str, messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    for index, message in enumerate(messages):
        for part in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(part), str):
                raise UserError(
                    f"{where}: message {index + 1} of {key!r} needs a text {part!r}, but is "
                    f"{_shortened(message)}"
                )
    return messages


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
