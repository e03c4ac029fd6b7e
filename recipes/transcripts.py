"""Turns preference rows whose prompt is a transcript ("Human: ... Assistant: ...") into lists of messages.

    python -m recipes.transcripts pairs.jsonl.gz pairs.jsonl

Rows have "prompt", "chosen" and "rejected" as text, as in copies of HH-RLHF. A model with a chat template should see
the turns of a conversation as its template writes them, not as one long user message.
"""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alphatoken.cli import readable_errors
from alphatoken.errors import UserError

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages_of(transcript: str, where: str) -> list[dict[str, str]]:
    """The turns of a transcript that ends where the assistant is to answer. Raises UserError for another text."""
    before, *parts = SPEAKER.split(transcript)
    if before.strip() or not parts:
        raise UserError(f"{where}: the prompt must begin with 'Human:' or 'Assistant:', but begins {transcript[:40]!r}")
    turns = [
        {"role": ROLES[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1] != {"role": "assistant", "content": ""}:
        raise UserError(f"{where}: the prompt must end with 'Assistant:', but ends {transcript[-40:]!r}")
    return turns[:-1]


def convert(source: Path, target: Path) -> int:
    """Writes the rows of `source` with prompts as messages to `target`; returns their number."""
    opener: Callable[..., Any] = gzip.open if source.suffix == ".gz" else open
    lines = []
    with opener(source, "rt", encoding="utf-8") as rows:
        for number, line in enumerate(rows, start=1):
            row = json.loads(line)
            lines.append(json.dumps({**row, "prompt": messages_of(row["prompt"], f"{source}:{number}")}))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def main(
    source: Annotated[Path, typer.Argument(help="Rows with transcripts: .jsonl or .jsonl.gz.")],
    target: Annotated[Path, typer.Argument(help="Rows with messages: .jsonl.")],
) -> None:
    """Writes the rows of SOURCE to TARGET with their prompts as messages."""
    with readable_errors():
        print(f"{convert(source, target)} rows written to {target}")


if __name__ == "__main__":
    typer.run(main)
