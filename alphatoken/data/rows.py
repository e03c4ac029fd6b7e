"""What a raw row says: a conversation, what is asked in it, or two answers to the same prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from alphatoken.batch import IGNORE_INDEX
from alphatoken.errors import UserError

Message = dict[str, Any]

PAIR_FORM = (
    "a row needs 'prompt', 'chosen' and 'rejected', each a text or a list of messages; or 'chosen' "
    "and 'rejected' as conversations that begin alike"
)

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that chat templates read as its reasoning."""
START_OF_REASONING, END_OF_REASONING = "<think>", "</think>"
"""What stands around reasoning in a message's text."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and the tools that can be called in it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas, as chat templates take them."""

    def first(self, count: int) -> Chat:
        """The conversation up to its first so many messages."""
        return Chat(self.messages[:count], self.tools)

    def and_then(self, messages: Sequence[Message]) -> Chat:
        """The conversation with messages behind it."""
        return Chat([*self.messages, *messages], self.tools)


@dataclass(frozen=True)
class RawPair:
    """Two ways to go on after the same conversation."""

    prompt: Chat
    chosen: list[Message]
    rejected: list[Message]


@contextmanager
def named(where: str) -> Iterator[None]:
    """Inside, a row is read or encoded: what fails at its values is a UserError that names it,
    also where nobody has thought of them."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, AttributeError, LookupError) as error:
        raise _unreadable(where, f"{type(error).__name__}: {error}") from error
    except (ValueError, ArithmeticError) as error:
        raise _unreadable(where, str(error)) from error
    except RecursionError as error:
        raise _unreadable(where, "it is nested too deeply") from error


def _unreadable(where: str, reason: str) -> UserError:
    return UserError(
        f"{where}: the row cannot be used ({reason}): correct what is odd in it, or leave it out"
    )


def as_chat(fields: dict[str, Any], where: str) -> Chat:
    """The row as a conversation. Raises UserError naming what is wrong with it."""
    if "messages" in fields and "response" not in fields:
        messages = _checked("messages", fields["messages"], where)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{where}: the conversation has no message with role 'assistant' to train on"
            )
        return Chat(messages, _tools(fields, where))
    if "prompt" in fields and "response" in fields and "messages" not in fields:
        answer = {
            "role": "assistant",
            "content": checked_text("response", fields["response"], where),
        }
        prompt = _turns("prompt", fields["prompt"], "user", where)
        return Chat([*prompt, answer], _tools(fields, where))
    hint = "; pairs are for recipes/preference.py and configurations with a section preference"
    raise UserError(
        f"{where}: a row needs either 'prompt' and 'response', or 'messages'; this one has "
        f"{', '.join(sorted(fields))}, which is no format known either (docs/operations.md, Data); "
        "name columns (columns: {prompt: ..., response: ...})"
        + (hint if "chosen" in fields else "")
    )


def is_tokenised(fields: dict[str, Any]) -> bool:
    """Whether a row comes as tokens, with what is trained of them."""
    return "input_ids" in fields and ("labels" in fields or "loss_mask" in fields)


def as_tokens(fields: dict[str, Any], vocabulary: int, where: str) -> tuple[list[int], list[bool]]:
    """The row's tokens and which of them are trained: `loss_mask` (1 or 0), or `labels` (the token
    itself or -100, at the token's own place). Raises UserError naming what is wrong with it."""
    ids = fields["input_ids"]
    if not isinstance(ids, list) or not all(
        type(each) is int and 0 <= each < vocabulary for each in ids
    ):
        raise UserError(
            f"{where}: 'input_ids' must be a list of tokens below {vocabulary} (the tokenizer's), "
            f"but is {_shortened(ids)}"
        )
    name = "labels" if "labels" in fields else "loss_mask"
    given = fields[name]
    if not isinstance(given, list) or len(given) != len(ids):
        found = len(given) if isinstance(given, list) else _shortened(given)
        raise UserError(
            f"{where}: {name!r} needs a value for each of {len(ids)} tokens, not {found}"
        )
    for place, (token, value) in enumerate(zip(ids, given, strict=True)):
        if name == "labels" and value not in (token, IGNORE_INDEX):
            raise UserError(
                f"{where}: label {place + 1} is {value!r}, but must be the token there ({token}) "
                f"or {IGNORE_INDEX}: labels stand at their token's own place, not one before"
            )
        if name == "loss_mask" and value not in (0, 1):
            raise UserError(f"{where}: value {place + 1} of 'loss_mask' is {value!r}, not 0 or 1")
    return ids, [value == 1 if name == "loss_mask" else value >= 0 for value in given]


def as_prompt(fields: dict[str, Any], where: str) -> Chat:
    """The row's conversation without the answer it ends with. Raises UserError naming what is wrong
    with it."""
    if "chosen" in fields:
        return as_pair(fields, where).prompt
    tools = _tools(fields, where)
    if "messages" in fields and "response" not in fields:
        messages = _checked("messages", fields["messages"], where)
        return Chat(messages[:-1] if messages[-1]["role"] == "assistant" else messages, tools)
    if "prompt" not in fields:
        raise UserError(
            f"{where}: a row needs a 'prompt', or 'messages'; this one is {_shortened(fields)}"
        )
    return Chat(_turns("prompt", fields["prompt"], "user", where), tools)


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
    return RawPair(Chat(prompt, _tools(fields, where)), *answers)


def is_trained(message: Message) -> bool:
    """Whether a message's own `train` or `weight` leaves it in."""
    return bool(message.get("train", True)) and bool(message.get("weight", 1))


def says_anything(message: Message) -> bool:
    """Whether a message has text or calls a tool."""
    return bool(message["content"].strip()) or bool(message.get("tool_calls"))


def reasoning_of(message: Message) -> str:
    """A message's reasoning, from a field of its own or from its text; empty without."""
    given = next((message[name] for name in REASONING if message.get(name)), "")
    thoughts, mark, _ = message["content"].rpartition(END_OF_REASONING)
    found: str = given or (thoughts.strip().removeprefix(START_OF_REASONING) if mark else "")
    return found.strip()


def answer_of(message: Message) -> str:
    """A message's text behind its reasoning."""
    answer: str = message["content"].rpartition(END_OF_REASONING)[2]
    return answer.strip()


def with_reasoning_in(field: str, message: Message) -> Message:
    """A message with its reasoning in one of `REASONING`, and its text behind it."""
    return {**message, "content": answer_of(message), field: reasoning_of(message)}


def asks_anything(messages: Sequence[Message]) -> bool:
    """Whether there is something to answer: more than instructions of the system."""
    return any(message["role"] not in ("system", "developer") for message in messages)


def has_text(messages: Sequence[Message], role: str | None = None) -> bool:
    """Whether anything is said, or anything by `role`."""
    return any(says_anything(message) for message in messages if role in (None, message["role"]))


def _common_start(first: Sequence[Message], second: Sequence[Message]) -> list[Message]:
    """The messages before the first answers that differ."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return list(first[:shared])


def _turns(key: str, value: Any, role: str, where: str) -> list[Message]:
    """A text as the only message of `role`; or checked messages."""
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(key, value, where)}]
    if isinstance(value, list):
        return _checked(key, value, where)
    raise UserError(
        f"{where}: {key!r} must be text or a list of messages, but is {_shortened(value)}"
    )


def _checked(key: str, messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {key!r} must be a non-empty list of {{role, content}}")
    return [
        _message(message, f"message {number} of {key!r}", where)
        for number, message in enumerate(messages, start=1)
    ]


def _message(message: Any, name: str, where: str) -> Message:
    """A message with text as its content and tool calls as chat templates take them, without what
    is null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: {name} needs a text 'role', but is {_shortened(message)}")
    given = {part: value for part, value in message.items() if value is not None}
    content = given.get("content", "" if given.get("tool_calls") else None)
    if isinstance(content, list):
        content = _joined(content, name, where)
    if not isinstance(content, str):
        raise UserError(f"{where}: {name} needs a text 'content', but is {_shortened(message)}")
    given["content"] = checked_text(f"content of {name}", content, where)
    if given.get("weight", 0) not in (0, 1):
        raise UserError(
            f"{where}: {name} has weight={given['weight']!r}: a message is trained (1) or not (0)"
        )
    if given.get("train", 0) not in (0, 1):
        raise UserError(
            f"{where}: {name} has train={given['train']!r}: a message is trained (true) or not "
            "(false)"
        )
    for part in REASONING:
        if not isinstance(given.get(part, ""), str):
            raise UserError(f"{where}: {name} has {part}={given[part]!r}, which must be text")
    if calls := given.get("tool_calls"):
        if not isinstance(calls, list):
            raise UserError(
                f"{where}: {name} has tool_calls={_shortened(calls)}, which must be a list of "
                "{function: {name, arguments}}"
            )
        given["tool_calls"] = [_call(call, name, where) for call in calls]
    return given


def _joined(parts: list[Any], name: str, where: str) -> str:
    """The text of a content that is a list of text parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{where}: {name} has a part of type {kind!r} in its 'content': only text is "
                "trained here; leave the row out, or the part"
            )
    return "".join(part["text"] for part in parts)


def _call(call: Any, name: str, where: str) -> dict[str, Any]:
    """A tool call whose arguments are not text: the templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: {name} needs 'tool_calls' of {{function: {{name, arguments}}}}, but one is "
            f"{_shortened(call)}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: {name} calls {function['name']!r} with arguments that are no JSON: "
                f"{error}"
            ) from None
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _tools(fields: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The row's tools, which may be text in JSON."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: 'tools' is no JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    ):
        raise UserError(f"{where}: 'tools' must be a list of schemas, but is {_shortened(tools)}")
    return tools


def checked_text(name: str, value: Any, where: str) -> str:
    """A text that can be tokenised. Raises UserError, which says what it is called and `where` it
    stands, for what is no text, and for half of a character."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, but is {_shortened(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name} has half of a character (the surrogate "
            f"{value[error.start]!a}) at {error.start + 1}: correct the text"
        ) from None
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
