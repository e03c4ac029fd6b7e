"""Turns preference rows whose prompt is a transcript ("Human: ... Assistant: ...") into lists of
messages.

    python -m recipes.transcripts pairs.jsonl.gz pairs.jsonl

Rows have "prompt", "chosen" and "rejected" as text, as in copies of HH-RLHF. A model with a chat
template should see the turns of a conversation as its template writes them, not as one long user
message.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alphatoken.cli import readable_errors
from alphatoken.errors import UserError


def messages_of(transcript: str, where: str) -> list[dict[str, str]]:
    """The turns of a transcript that ends where the assistant is to answer. Raises UserError for
    another text."""
    from alphatoken.data.formats import turns_of  # loads torch: not for --help

    turns = turns_of(transcript, where)
    if turns[-1] != {"role": "assistant", "content": ""}:
        raise UserError(
            f"{where}: the prompt must end with 'Assistant:', but ends {transcript[-40:]!r}"
        )
    return turns[:-1]


def convert(source: Path) -> list[dict[str, Any]]:
    """The rows of `source` with prompts as messages."""
    opener: Callable[..., Any] = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        {**row, "prompt": messages_of(row["prompt"], f"{source}:{number}")}
        for number, row in enumerate(rows, start=1)
    ]


def hold_out(
    rows: list[dict[str, Any]], count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows without, and with, those of the first conversations that together have at least
    `count`.

    Rows whose conversations begin alike may share answers, so they stay together.
    """
    by_start: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_start.setdefault(row["prompt"][0]["content"], []).append(row)
    conversations = iter(by_start.values())
    held_out: list[dict[str, Any]] = []
    while len(held_out) < count:
        held_out += next(conversations)
    return [row for conversation in conversations for row in conversation], held_out


def write(rows: list[dict[str, Any]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows written to {target}")


def main(
    source: Annotated[Path, typer.Argument(help="Rows with transcripts: .jsonl or .jsonl.gz.")],
    target: Annotated[Path, typer.Argument(help="Rows with messages: .jsonl.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Where to write rows that are held out of TARGET.")
    ] = None,
    held_out_rows: Annotated[
        int, typer.Option(help="How many, at least: whole conversations.")
    ] = 64,
) -> None:
    """Writes the rows of SOURCE to TARGET with their prompts as messages."""
    with readable_errors():
        rows = convert(source)
        if held_out is not None:
            rows, others = hold_out(rows, held_out_rows)
            write(others, held_out)
        write(rows, target)


if __name__ == "__main__":
    typer.run(main)
