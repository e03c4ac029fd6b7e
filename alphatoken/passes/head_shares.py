"""Which attention heads each of the ranks takes that divide rows.

Rank r of R takes query heads [r H // R, (r + 1) H // R), of which some ranks, the last one among
them, have one more than others where R does not divide H; and it reads the key heads that belong to
them. Messages have the same size for every rank: one that takes a head less is sent one more all
the same, and drops it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig


@dataclass(frozen=True)
class HeadShares:
    """The attention heads of a model, of which each rank takes some."""

    heads: int
    """H, of the queries."""
    key_heads: int
    """G, which divides H."""
    ranks: int
    """R, at most H."""

    @classmethod
    def of_model(cls, config: PretrainedConfig, ranks: int) -> HeadShares:
        """From a `config.json`."""
        text = config.get_text_config()
        heads: int = text.num_attention_heads
        return cls(heads, getattr(text, "num_key_value_heads", None) or heads, ranks)

    @property
    def are_even(self) -> bool:
        """Whether every rank takes as many."""
        return self.heads % self.ranks == 0

    @property
    def queries_sent(self) -> int:
        """Query heads that each rank is sent: as many as the one takes that takes most."""
        return -(-self.heads // self.ranks)

    @cached_property
    def keys_sent(self) -> int:
        """Key heads that each rank is sent: as many as the one reads that reads most; where all
        take as many, as many as have equally many queries each on every rank, perhaps copies."""
        if self.are_even:
            return math.lcm(self.key_heads, self.ranks) // self.ranks
        return max(read[-1] - read[0] + 1 for read in map(self._read_by, range(self.ranks)))

    @property
    def idle(self) -> float:
        """Share of the time in attention, of all ranks, that passes in waiting for those that take
        most heads."""
        return 1 - self.heads / (self.ranks * self.queries_sent)

    @property
    def told(self) -> str:
        """A sentence on how the ranks take the heads."""
        most = self.queries_sent
        if self.are_even:
            return f"each of the {self.ranks} ranks that divide a row takes {most} attention heads"
        return (
            f"of the {self.heads} attention heads the {self.ranks} ranks that divide a row take "
            f"{most - 1} or {most}, so that {self.idle:.0%} of their time in attention is waiting"
        )

    def taken(self, rank: int) -> range:
        """Query heads that a rank takes."""
        return range(rank * self.heads // self.ranks, (rank + 1) * self.heads // self.ranks)

    def queries(self) -> list[int]:
        """The query heads to send, to each rank in turn; those that it takes come first."""
        firsts = [self.taken(rank).start for rank in range(self.ranks)]
        return [first + place for first in firsts for place in range(self.queries_sent)]

    def keys(self) -> list[int]:
        """The key heads to send, to each rank in turn."""
        firsts = map(self._first_key, range(self.ranks))
        return [first + place for first in firsts for place in range(self.keys_sent)]

    def keys_read(self, rank: int) -> list[int]:
        """Which of the key heads that it is sent a rank gives its kernel, which wants equally many
        queries for each: one for every query where that is not so."""
        read = [key - self._first_key(rank) for key in self._read_by(rank)]
        is_uniform = len(set(Counter(read).values())) == 1
        return sorted(set(read)) if is_uniform else read

    def outputs(self) -> list[int]:
        """Where the outputs of all heads are among `queries_sent` of each rank in turn."""
        return [
            rank * self.queries_sent + place
            for rank in range(self.ranks)
            for place in range(len(self.taken(rank)))
        ]

    def _read_by(self, rank: int) -> list[int]:
        """The key head of each query head that a rank takes."""
        return [head * self.key_heads // self.heads for head in self.taken(rank)]

    def _first_key(self, rank: int) -> int:
        return min(self._read_by(rank)[0], self.key_heads - self.keys_sent)
