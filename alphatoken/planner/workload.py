"""How many rows and tokens an optimizer step has, on one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.selection.step import selections_at

if TYPE_CHECKING:  # it reads data with libraries that a plan without data need not load
    from alphatoken.data.cache import TokenDataset


@dataclass(frozen=True)
class Rows:
    """The lengths that a plan assumes: every row as long as this, with this share of response
    tokens.

    Of a preference pair a row is one of its two documents.
    """

    tokens: int
    response_share: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UserError(
                f"--row-tokens {self.tokens}: a row has a prompt and a response, at least 2 tokens"
            )
        if not 0 < self.response_share <= 1:
            raise UserError(
                f"--response-share {self.response_share} is a share: above 0, at most 1"
            )

    @property
    def responses(self) -> int:
        """Response tokens of one row; its first token is predicted by nothing."""
        return min(self.tokens - 1, max(1, round(self.response_share * self.tokens)))


def longest_rows(config: RunConfig, response_share: float = 1.0) -> Rows:
    """Rows as long as the configuration allows."""
    if isinstance(config, PreferenceRunConfig):
        return Rows(
            config.preference.max_prompt_tokens + config.preference.max_response_tokens,
            response_share,
        )
    return Rows(config.data.max_length, response_share)


@dataclass(frozen=True)
class Workload:
    """One rank's part of an optimizer step. A micro-batch is (rows, row_tokens), all of them
    alike."""

    row_tokens: int
    """Tokens of a row, or of this rank's part of it."""
    parts: int
    """Over how many ranks a row is divided. Response tokens are divided alike."""
    rows: int
    micro_batches: int
    responses: int
    """Response tokens of a micro-batch."""
    kept: int
    """Those it trains on."""
    held_out_documents: int
    """Documents of a held-out row: 2 where pairs are compared."""
    held_out_rows: int
    held_out_batches: int
    held_out_responses: int
    """Response tokens of one held-out micro-batch."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.row_tokens

    @property
    def most_responses(self) -> int:
        """Response tokens of a micro-batch on the rank that has most of them: they are at the end
        of a row, and so in its last parts."""
        return min(self.tokens, self.parts * self.responses)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of a held-out micro-batch."""
        return self.held_out_rows * self.row_tokens


def workload_of(config: RunConfig, rows: Rows, ranks: int) -> Workload:
    """The step that `config` describes, on one of so many ranks, which must divide it."""
    parts = config.train.sequence_parallel
    groups = ranks // parts

    def share(tokens: int) -> int:
        return math.ceil(tokens / parts)

    # Where a schedule ends.
    selections = selections_at(config, max(1, config.valuation.start_step), 1)
    micro_rows = config.train.micro_batch_size
    drawn = config.valuation.validation_sequences
    documents = len(selections) if config.valuation.target == "preference" else 1
    size = config.held_out_batch_rows(drawn, documents * rows.tokens, groups)
    batches = math.ceil(math.ceil(drawn / size) / groups)
    valued = config.valuation.enabled
    return Workload(
        row_tokens=share(rows.tokens),
        parts=parts,
        rows=micro_rows * len(selections),  # a pair is two documents
        micro_batches=config.train.global_batch_size // (config.train.micro_batch_size * groups),
        responses=share(micro_rows * len(selections) * rows.responses),
        kept=share(
            sum(selection.kept_count([rows.responses] * micro_rows) for selection in selections)
        ),
        held_out_documents=documents,
        held_out_rows=size * documents if valued else 0,
        held_out_batches=batches if valued else 0,
        held_out_responses=share(size * documents * rows.responses) if valued else 0,
    )


def rows_of(dataset: TokenDataset, documents: int) -> Rows:
    """Rows as long as the longest of a dataset, with its share of response tokens; `documents` of
    each row count."""
    tokens = sum(report.tokens for report in dataset.reports)
    responses = sum(report.response_tokens for report in dataset.reports)
    return Rows(math.ceil(int(dataset.lengths.max()) / documents), responses / tokens)
