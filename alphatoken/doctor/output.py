"""What a user sees of an examination: a table and what belongs to it, or one JSON document. Rank 0
reports."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Never

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alphatoken.doctor.findings import Finding
from alphatoken.util.wording import plural

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
TRAINED = r"(?s)\[\[.*?\]\]"


class Output:
    """Where the report goes. As JSON it is all that reaches the standard output: whatever else
    would be written there, by any library, goes to the standard error from now on.
    """

    def __init__(self, *, as_json: bool, is_first: bool) -> None:
        self.is_first = is_first
        self._as_json = as_json
        self._reported = threading.Lock()
        self._descriptor = os.dup(1)
        if as_json:
            sys.stdout.flush()
            os.dup2(2, 1)

    def report(self, findings: Sequence[Finding], nodes: Sequence[str]) -> None:
        """Prints everything, on rank 0 and once."""
        if not self.is_first or not self._reported.acquire(blocking=False):
            return
        if self._as_json:
            document = json.dumps(as_document(findings, nodes), ensure_ascii=False, indent=1) + "\n"
            os.write(self._descriptor, document.encode())
            return
        show(findings, nodes, Console(highlight=False))

    def complain(self, finding: Finding) -> None:
        """What another rank than 0 has to say where rank 0 may not hear of it."""
        if not self.is_first:
            print(f"error: {finding.found}", file=sys.stderr, flush=True)

    def end(self, status: int) -> Never:
        """Ends the process at once: threads of torch may still wait for a store, and would keep or
        abort it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def as_document(findings: Sequence[Finding], nodes: Sequence[str]) -> dict[str, object]:
    return {
        "ok": not any(finding.outcome == "failed" for finding in findings),
        "ranks": len(nodes),
        "nodes": sorted(set(nodes)),
        "summary": summary(findings, nodes),
        "checks": [finding.as_dict() for finding in findings],
    }


def show(findings: Sequence[Finding], nodes: Sequence[str], console: Console) -> None:
    """Details, then the table, one row a check, then the last line: what matters most is what a
    terminal shows last."""
    for finding in findings:
        if finding.details:
            title, *lines = finding.details
            body = Text("\n".join(lines))
            body.highlight_regex(TRAINED, "bold green")
            console.print(title, markup=False)
            console.print(body)
            console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for finding in findings:
        text = Text(finding.found, style="dim" if finding.outcome == "skipped" else "")
        if finding.fix and finding.outcome != "ok":
            text.append(f"\n-> {finding.fix}", style="bold")
        table.add_row(Text(finding.outcome, style=STYLES[finding.outcome]), finding.check, text)
    console.print(table)
    console.print(f"\n{summary(findings, nodes)}", markup=False, soft_wrap=True)


def summary(findings: Sequence[Finding], nodes: Sequence[str]) -> str:
    """How many problems there are, and on which nodes."""
    failed = [finding for finding in findings if finding.outcome == "failed"]
    warnings = sum(finding.outcome == "warning" for finding in findings)
    everywhere = sorted(set(nodes))
    concerned = sorted({node for finding in failed for node in finding.nodes or everywhere})
    count = (
        f"{plural(len(failed), 'problem')} on {', '.join(concerned)}" if failed else "no problems"
    )
    about = f"{plural(len(nodes), 'rank')} on {', '.join(everywhere)}"
    return f"{count}, {plural(warnings, 'warning')} ({about})"
