"""Numbers and texts of a run as a page shows them."""

from __future__ import annotations

import math
import unicodedata

from markupsafe import Markup, escape

from alphatoken.util.metrics import metric_of
from alphatoken.util.wording import size

UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories of Unicode
JOINER = "\u200d"  # between the parts of one emoji


def number(value: float, unit: str = "") -> str:
    """A number with its unit, to four digits or more, or whole."""
    if unit == "bytes":
        return size(value)
    if not math.isfinite(value):
        text = str(value)
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def unit_of(metric: str) -> str:
    """The unit of a metric by the table; empty where it has none."""
    known = metric_of(metric)
    return "" if known is None else known.unit


def sentence_of(metric: str) -> str:
    """What a metric means by the table; empty where it is not declared there."""
    known = metric_of(metric)
    return "" if known is None else known.sentence


def sentence(text: str) -> Markup:
    """A sentence with what stands in backticks set as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(text.split("`"))
    )


def visible(text: str) -> str:
    """A text in which nothing is invisible or turns the direction of what follows: controls,
    formats, separators of lines and what is no character are written as Python would escape them.
    Line breaks stay."""
    if text.isprintable():  # most texts are: Python then knows no such character in it
        return text
    return "".join(
        each
        if each in ("\n", JOINER) or unicodedata.category(each) not in UNSEEN
        else each.encode("unicode_escape", "surrogatepass").decode("ascii")
        for each in text
    )
