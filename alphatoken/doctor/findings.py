"""What a check returns, and how one is made of what every rank has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

from alphatoken.distributed import collectives
from alphatoken.errors import UserError

T = TypeVar("T")
Outcome = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    outcome: Outcome
    found: str
    fix: str = ""
    nodes: tuple[str, ...] = ()
    """The nodes concerned; none where it is about all of them alike."""
    details: tuple[str, ...] = ()
    """Lines to be shown below the report."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seen(Generic[T]):
    """What came of some work on each rank: its result, or why there is none, in rank order."""

    own: T | None
    """This rank's result."""
    failures: tuple[str | None, ...]

    @property
    def everywhere(self) -> bool:
        """Whether every rank has a result."""
        return not any(self.failures)


def on_every_rank(work: Callable[[], T]) -> Seen[T]:
    """Runs `work` on each rank and gathers what went wrong, whatever it was; nothing is raised on
    any rank.

    `work` must not communicate: a rank whose work fails would leave the others waiting.
    """
    own: T | None = None
    failure: str | None = None
    try:
        own = work()
    except UserError as error:
        failure = str(error)
    except (
        Exception
    ) as error:  # a check that breaks is reported like one that fails, and the next one runs
        failure = f"{type(error).__name__}: {error}"
    return Seen(own, tuple(collectives.gather_objects(failure)))


def verdict(
    check: str, seen: Seen[Any], nodes: Sequence[str], found: str, fix: str = ""
) -> Finding:
    """`found` where every rank succeeded; else each failure with the ranks that had it. `nodes`: by
    rank."""
    if seen.everywhere:
        return Finding(check, "ok", found)
    ranks_of: dict[str, list[int]] = {}
    for rank, failure in enumerate(seen.failures):
        if failure is not None:
            ranks_of.setdefault(failure, []).append(rank)
    return disagreement(check, ranks_of, nodes, fix)


def disagreement(
    check: str, ranks_of: dict[str, list[int]], nodes: Sequence[str], fix: str
) -> Finding:
    """A failure with every message and the ranks that it is about; those of all ranks go without a
    name."""
    parts = [
        message if len(ranks) == len(nodes) else f"{named(ranks, nodes)}: {message}"
        for message, ranks in ranks_of.items()
    ]
    concerned = {nodes[rank] for ranks in ranks_of.values() for rank in ranks}
    return Finding(check, "failed", "; ".join(parts), fix, tuple(sorted(concerned)))


def named(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """`node-b (ranks 4, 5)`, for each node of the given ranks."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return ", ".join(
        f"{node} (rank{'s' if len(own) > 1 else ''} {_listed(own)})"
        for node, own in by_node.items()
    )


def _listed(numbers: Sequence[int]) -> str:
    """`0-7` for consecutive numbers, else all of them."""
    consecutive = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if consecutive else ", ".join(map(str, numbers))


def skipped(check: str, needs: str) -> Finding:
    """A check that had nothing to look at."""
    return Finding(check, "skipped", f"needs {needs}")
