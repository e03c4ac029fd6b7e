"""Where what a message says stands in the text that a chat template makes of it, and what of it the
template leaves out."""

from __future__ import annotations

import bisect
import re
from collections import Counter

from alphatoken.data.rows import END_OF_REASONING, Message, answer_of, reasoning_of
from alphatoken.errors import UserError

EMPTY_REASONING = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*$")
"""What asks for an answer without reasoning."""
WORD = re.compile(r"\w+")
RECOGNISED = 20
"""Characters at either end of a text, or half of it, by which it is found in what a template made
of it."""

UNSAID_REASONING = "turns whose reasoning the chat template leaves out"
UNSAID_TEXT = "tool calls beside a text that the chat template leaves out"


def check_said(message: Message, text: str, start: int, where: str) -> tuple[str, ...]:
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
    place = text.find(reasoning, search_start(start, reasoning)) if reasoning else -1
    behind = place + len(reasoning) if place >= 0 else start
    begins = text.find(answer, behind) if answer else -1
    if answer and begins < 0:  # what was found is of the answer
        place, behind, begins = -1, start, text.find(answer, start)
    mark = text.find(END_OF_REASONING, behind, begins if begins >= 0 else len(text))
    if begins >= 0:
        return begins if place >= 0 or mark >= 0 else start
    return mark + len(END_OF_REASONING) if mark >= 0 else behind


def stands_in(message: Message, text: str) -> bool:
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
    return any(text.find(end, search_start(start, end)) >= 0 for end in ends)


def search_start(start: int, part: str) -> int:
    """From where a text is looked for that reaches beyond `start`: what asks for an answer may be
    its beginning (`<think>`)."""
    return max(0, start - len(part) + 1)


def other_opening(asked: str, text: str, index: int, message: Message) -> str:
    """Why an answer cannot be trained that does not stand behind what asks for it."""
    same = alike(asked, text)
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


def behind_question(
    asked: str, plain: str, text: str, last: Message, answer: Message
) -> str | None:
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


def behind_empty(asked: str, text: str) -> str | None:
    """What asks for an answer with the answer behind it, where that ends in empty reasoning that
    the template does not write before an answer. None where it is not so."""
    empty = EMPTY_REASONING.search(asked)
    if empty is None or not text.startswith(asked[: empty.start()]):
        return None
    answer = text[empty.start() :]
    opening = re.match(r"<[^>]*>", empty[0])
    assert opening is not None, "EMPTY_REASONING begins so"
    return None if answer.lstrip().startswith(opening[0]) else asked + answer


def alike(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    places = range(1, min(len(first), len(second)) + 1)
    return bisect.bisect_left(places, 1, key=lambda end: not first.startswith(second[:end]))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
