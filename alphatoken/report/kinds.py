"""What kind of token a token is, and where in its response it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alphatoken.report.responses import ValuedResponse

KINDS = (
    "words",
    "digits",
    "punctuation",
    "white space",
    "code",
    "reasoning",
    "tool call",
    "end of turn",
)

# How templates of the field delimit them; what is not closed goes on to the end.
SPANS = {
    "tool call": re.compile(
        r"<tool_call>.*?(?:</tool_call>|\Z)"
        r"|<\|tool_call(?:_start|s_begin|s_section_begin)?\|>"
        r".*?(?:<\|tool_call(?:_end|s_end|s_section_end)\|>|\Z)"
        r"|(?:\[TOOL_CALLS\]|<\|python_tag\|>|<function_call>).*?\Z",
        re.DOTALL,
    ),
    "reasoning": re.compile(
        r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)"
        r"|\[THINK\].*?(?:\[/THINK\]|\Z)"
        r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|\Z)",
        re.DOTALL,
    ),
    "code": re.compile(r"```.*?(?:```|\Z)", re.DOTALL),
}


def kinds_of(response: ValuedResponse) -> list[str]:
    """The kind of each token, one of KINDS: what it is part of comes before what it looks like."""
    text, starts = _joined(response)
    inside = {kind: [match.span() for match in form.finditer(text)] for kind, form in SPANS.items()}
    kinds = []
    for token, ends, start in zip(response.tokens, response.ends_turn, starts, strict=True):
        around = (
            kind
            for kind, spans in inside.items()
            if any(begin < start + len(token) and start < end for begin, end in spans)
        )
        kinds.append("end of turn" if ends else next(around, _look_of(token)))
    return kinds


def places_of(response: ValuedResponse) -> list[str]:
    """Where in its response each token stands, counted from 1: the first, the second, and then
    ranges that double."""
    return [place(number) for number in range(1, len(response.tokens) + 1)]


def place(number: int) -> str:
    """The range that a token's number in its response, from 1, is in: `1`, `2`, `3-4`, `5-8`."""
    end = 1 << (number - 1).bit_length()
    begin = end // 2 + 1
    return str(end) if begin >= end else f"{begin}-{end}"


def _joined(response: ValuedResponse) -> tuple[str, Sequence[int]]:
    """The whole text, and where in it each token begins. A prompt may open what the response
    closes."""
    given = dict(response.given)
    text, starts = "", []
    for number, token in enumerate(response.tokens):
        text += given.get(number, "")
        starts.append(len(text))
        text += token
    return text, starts


def _look_of(token: str) -> str:
    bare = token.strip()
    if not bare:
        return "white space"
    if any(each.isdigit() for each in bare):
        return "digits"
    return "words" if any(each.isalpha() for each in bare) else "punctuation"
