"""Known corruptions of chat rows: pure functions of a seed that say which characters are bad.

Rows are {prompt, response}. A corruption changes the *text* of a response, so that a recipe that
reads the rows from a file trains on exactly what is marked here, and marks half-open spans of
characters. `bad_tokens` turns these into a mask over tokens once the text is tokenised: a token is
bad if any of its characters is.

| name | in a share of the rows (exactly, rounded) | what is bad |
|---|---|---|
| junk | a fifth of the response's tokens become random pieces of the vocabulary | those pieces |
| digits | a fifth of the response's digits, at least one, become other digits | those digits |
| rule | the last result of a calculation, wherever it stands, is 10 too high | other digits |
| rule_computed | as rule, in the same rows | other digits where the result is computed |
| advertisement | a constant sentence stands in front of the response | the sentence |
| swapped | the response is another such row's | all of it |
| off_target | the row is one of another data set | all of its response |
| none | nothing | nothing |

The end of a turn is never bad: it has no characters of the response. A later mention of a wrong
result is right after what stands before it, so what sees a token in its context cannot tell it, and
need not: `rule_computed` counts it among the good.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one after the last."""

PART = 0.2
"""Share of a response's tokens, or digits, that are replaced in a corrupted row."""
TOO_HIGH = 10
"""What the wrong rule adds to a result."""
ADVERTISEMENT = "This answer is brought to you by Brightway, the home of clever calculators."

DIGIT = re.compile(r"[0-9]")
RESULT = re.compile(r"=\s*([0-9]+)(?![0-9]|[.,][0-9])")


@dataclass(frozen=True)
class MarkedRow:
    """A row and the characters of its response that are bad."""

    prompt: str
    response: str
    bad: tuple[Span, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The row as recipes read it; they ignore `bad`."""
        return {"prompt": self.prompt, "response": self.response, "bad": list(map(list, self.bad))}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MarkedRow:
        """Reverses `as_json`; a row without `bad` has nothing bad."""
        bad = tuple((int(start), int(end)) for start, end in fields.get("bad", ()))
        return cls(fields["prompt"], fields["response"], bad)


@dataclass(frozen=True)
class Materials:
    """What corruptions are made of, besides the rows."""

    cut: Callable[[str], Sequence[str]] = str.split
    """A text's tokens as text; joined they are the text. For `junk`."""
    pieces: Sequence[str] = ()
    """Text of tokens that `junk` draws from."""
    others: Sequence[MarkedRow] = field(default_factory=tuple)
    """Rows of another data set, for `off_target`."""


def corrupt(
    name: str,
    rows: Sequence[MarkedRow],
    *,
    seed: int,
    share: float = 0.6,
    materials: Materials | None = None,
) -> list[MarkedRow]:
    """The rows in their order, `share` of them corrupted; the same for the same arguments.

    Raises KeyError for an unknown name and ValueError where the materials do not suffice.
    """
    rng = random.Random(f"{SAME_ROWS.get(name, name)}:{seed}")
    chosen = sorted(rng.sample(range(len(rows)), round(share * len(rows))))
    changed = CORRUPTIONS[name]([rows[index] for index in chosen], rng, materials or Materials())
    corrupted = list(rows)
    for index, row in zip(chosen, changed, strict=True):
        corrupted[index] = row
    return corrupted


def junk(rows: Sequence[MarkedRow], rng: random.Random, materials: Materials) -> list[MarkedRow]:
    """Replaces PART of the tokens of each response, at least one, by random pieces."""
    if not materials.pieces:
        raise ValueError("junk needs the pieces of a vocabulary: materials.pieces is empty")

    def changes(response: str) -> list[tuple[Span, str]]:
        spans = spans_of(materials.cut(response))
        replaced = rng.sample(spans, max(1, round(PART * len(spans))))
        return [(span, rng.choice(materials.pieces)) for span in sorted(replaced)]

    return [_substituted(row, changes(row.response)) for row in rows]


def digits(rows: Sequence[MarkedRow], rng: random.Random, materials: Materials) -> list[MarkedRow]:
    """Replaces PART of the digits of each response, at least one, by other digits."""

    def changes(response: str) -> list[tuple[Span, str]]:
        places = [match.start() for match in DIGIT.finditer(response)]
        count = min(len(places), max(1, round(PART * len(places))))
        return [
            ((place, place + 1), rng.choice("0123456789".replace(response[place], "")))
            for place in sorted(rng.sample(places, count))
        ]

    return [_substituted(row, changes(row.response)) for row in rows]


def rule(rows: Sequence[MarkedRow], rng: random.Random, materials: Materials) -> list[MarkedRow]:
    """Makes the last result of each response wrong, always in the same way."""
    return [MarkedRow(row.prompt, *by_wrong_rule(row.response)) for row in rows]


def rule_computed(
    rows: Sequence[MarkedRow], rng: random.Random, materials: Materials
) -> list[MarkedRow]:
    """What `rule` makes, with only the first of its marks."""
    return [replace(row, bad=row.bad[:1]) for row in rule(rows, rng, materials)]


def by_wrong_rule(response: str) -> tuple[str, tuple[Span, ...]]:
    """A response whose last result, and each later mention of it, is TOO_HIGH too high, and where
    it has other digits; unchanged where nothing is calculated."""
    results = list(RESULT.finditer(response))
    if not results:
        return response, ()
    last = results[-1]
    mention = re.compile(rf"(?<![0-9.,]){last[1]}(?![0-9]|[.,][0-9])")
    wrong = str(int(last[1]) + TOO_HIGH)
    spans = [last.span(1), *(match.span() for match in mention.finditer(response, last.end(1)))]
    text, replaced = substitute(response, [(span, wrong) for span in spans])
    first, end = _differing(last[1], wrong)
    return text, tuple((start + first, start + end) for start, _ in replaced)


def _differing(right: str, wrong: str) -> Span:
    """The digits of `wrong` without those at both ends that `right` has in the same places; all of
    them where one number is longer."""
    if len(right) != len(wrong):
        return 0, len(wrong)
    places = [
        place for place, pair in enumerate(zip(right, wrong, strict=True)) if len({*pair}) > 1
    ]
    return places[0], places[-1] + 1


def advertisement(
    rows: Sequence[MarkedRow], rng: random.Random, materials: Materials
) -> list[MarkedRow]:
    """Puts ADVERTISEMENT and a space in front of each response."""
    return [
        MarkedRow(row.prompt, f"{ADVERTISEMENT} {row.response}", ((0, len(ADVERTISEMENT)),))
        for row in rows
    ]


def swapped(rows: Sequence[MarkedRow], rng: random.Random, materials: Materials) -> list[MarkedRow]:
    """Deals the responses round: every row gets that of another one."""
    if len(rows) == 1:
        raise ValueError("swapped needs at least two corrupted rows, not one")
    circle = list(range(len(rows)))
    rng.shuffle(circle)
    giver = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [_all_bad(row.prompt, rows[giver[number]].response) for number, row in enumerate(rows)]


def off_target(
    rows: Sequence[MarkedRow], rng: random.Random, materials: Materials
) -> list[MarkedRow]:
    """Replaces the rows by rows of another data set, none of them twice."""
    if len(materials.others) < len(rows):
        raise ValueError(
            f"off_target needs {len(rows)} rows of another data set, but materials.others has "
            f"{len(materials.others)}"
        )
    others = rng.sample(list(materials.others), len(rows))
    return [_all_bad(other.prompt, other.response) for other in others]


def none(rows: Sequence[MarkedRow], rng: random.Random, materials: Materials) -> list[MarkedRow]:
    """Leaves the rows as they are."""
    return list(rows)


Corruption = Callable[[Sequence[MarkedRow], random.Random, Materials], list[MarkedRow]]
"""Corrupts every row it is given."""

CORRUPTIONS: dict[str, Corruption] = {
    "junk": junk,
    "digits": digits,
    "rule": rule,
    "rule_computed": rule_computed,
    "advertisement": advertisement,
    "swapped": swapped,
    "off_target": off_target,
    "none": none,
}

SAME_ROWS = {"rule_computed": "rule"}
"""Corruptions that choose the rows of another one."""


def human_spans(fields: Mapping[str, Any]) -> MarkedRow:
    """A row of `qa_feedback_spans`: its response with what people marked as wrong in it."""
    bad = tuple((int(span["start"]), int(span["end"])) for span in fields["spans"])
    return MarkedRow(fields["prompt"], fields["response"], bad)


def substitute(text: str, changes: Sequence[tuple[Span, str]]) -> tuple[str, tuple[Span, ...]]:
    """Replaces spans, given in ascending order, and says where the replacements are now."""
    parts: list[str] = []
    spans: list[Span] = []
    length = position = 0
    for (start, end), new in changes:
        kept = text[position:start]
        spans.append((length + len(kept), length + len(kept) + len(new)))
        parts += [kept, new]
        length += len(kept) + len(new)
        position = end
    return "".join([*parts, text[position:]]), tuple(spans)


def spans_of(tokens: Sequence[str]) -> list[Span]:
    """Where tokens that follow each other without a gap are."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return [span for span in itertools.pairwise(ends) if span[1] > span[0]]


def vocabulary_materials(tokenizer: PreTrainedTokenizerBase) -> Materials:
    """How this tokenizer cuts a text, and its printable pieces that are not special."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    texts = [tokenizer.decode([token]) for token in ordinary]
    pieces = [
        text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text
    ]

    def cut(text: str) -> list[str]:
        # White space before a token may belong to no token's offsets; here it is the token's own.
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = sorted({end for _, end in encoding["offset_mapping"]} | {0, len(text)})
        return [text[start:end] for start, end in itertools.pairwise(ends)]

    return Materials(cut=cut, pieces=pieces)


def bad_tokens(tokenizer: PreTrainedTokenizerBase, row: MarkedRow) -> list[bool]:
    """Whether each token of the row's conversation, as the chat template renders it, is bad.

    Raises ValueError where the rendered conversation does not have the response as it is.
    """
    messages = [
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": row.response},
    ]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    first = text.rfind(row.response)
    if first < 0:
        raise ValueError(
            f"the chat template changes the response {row.response[:60]!r}, so its characters "
            "cannot be found"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        any(start < first + bad_end and first + bad_start < end for bad_start, bad_end in row.bad)
        for start, end in encoding["offset_mapping"]
    ]


def _substituted(row: MarkedRow, changes: Sequence[tuple[Span, str]]) -> MarkedRow:
    return MarkedRow(row.prompt, *substitute(row.response, changes))


def _all_bad(prompt: str, response: str) -> MarkedRow:
    return MarkedRow(prompt, response, ((0, len(response)),))
