"""What the tokenised rows are like: whether turns end with a label, how long they are, and whether
parts overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from alphatoken.batch import IGNORE_INDEX, Batch
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.audit import ending, last_said
from alphatoken.data.batches import Layout, micro_batches, row_tokens
from alphatoken.data.cache import TokenDataset
from alphatoken.data.pretrained import read_settings
from alphatoken.data.splits import Splits, shared_rows
from alphatoken.data.tokenizer import stop_tokens
from alphatoken.doctor.findings import Finding
from alphatoken.models.compatibility import check_divided_rows
from alphatoken.models.loading import name_attention
from alphatoken.passes.head_shares import HeadShares
from alphatoken.planner.workload import longest_rows
from alphatoken.util.wording import plural

LOOKED_AT = 64  # rows that are collated
BARS = 8
BAR_WIDTH = 30
NOTABLE_WAITING = 0.2  # share of the time in attention
NOTABLE = 0.05  # share of rows that are cut or skipped


@dataclass(frozen=True)
class Response:
    """One turn of the assistant in a collated document: tokens [start, end) of it, by the mask of
    the dataset."""

    ids: list[int]
    labels: list[int]
    start: int
    end: int
    is_cut: bool


def check_endings(
    dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Finding:
    """That each response in collated micro-batches ends with a labelled token at which generation
    stops.

    Rows are collated as for training, and once more with each stop token as the padding. Responses
    that are cut at a limit of length have no end and are counted apart.
    """
    stops = stop_tokens(config.model, tokenizer)
    by_length = np.argsort(dataset.lengths, kind="stable")
    rows = by_length[np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(np.int64))]
    cut = total = 0
    for pad in dict.fromkeys((tokenizer.pad_token_id, *stops)):
        complaints = Counter[str]()
        cut = total = 0
        layout = Layout(config.train.micro_batch_size, pad, row_tokens(name_attention(config)))
        for batch in micro_batches(dataset, rows, layout, rank=0, world_size=1):
            for response in _responses(batch, dataset, config):
                problem = _problem(response, tokenizer, stops)
                total += 1
                cut += response.is_cut
                if problem is not None:
                    complaints[problem] += 1
            complaints["padding has labels"] += bool(
                (batch["labels"] != IGNORE_INDEX)[batch["document_ids"] < 0].any()
            )
        complaints += Counter()  # drops zeros
        if complaints:
            found = "; ".join(
                f"{plural(count, 'response')} of {total}: {what}"
                for what, count in complaints.items()
            )
            where = f"collated with {tokenizer.convert_ids_to_tokens(pad)} as padding"
            fix = (
                "without it the model never learns to stop: correct the chat template, or "
                "eos_token_id of the model"
            )
            return Finding("end of turn", "failed", f"{found} ({where})", fix)
    tokens = ", ".join(tokenizer.convert_ids_to_tokens(list(stops)))
    found = (
        f"{total - cut} of {plural(total, 'response')} end with a label on a token that stops "
        f"({tokens}), "
    )
    found += "also where that is the padding" + (f"; {cut} cut, without an end" if cut else "")
    return Finding("end of turn", "ok", found)


def describe_lengths(dataset: TokenDataset, config: RunConfig) -> Finding:
    """A histogram of the training rows' lengths, and how many were cut and skipped."""
    reports = dataset.reports
    rows, skipped = len(dataset), sum(sum(report.skipped.values()) for report in reports)
    cut = Counter[str]()
    reasons = Counter[str]()
    for report in reports:
        cut.update(report.cut)
        reasons.update(report.skipped)
    lengths = dataset.lengths
    notes = [f"{count / rows:.1%} {what}" for what, count in cut.items()]
    notes += [
        f"{count / (rows + skipped):.1%} skipped: {reason}" for reason, count in reasons.items()
    ]
    found = (
        f"{plural(rows, 'row')} of {lengths.min()} to {lengths.max()} tokens, median "
        f"{np.median(lengths):.0f}; "
    )
    found += "; ".join(notes) or "none cut, none skipped"
    what = (
        "pairs (chosen and rejected together)"
        if isinstance(config, PreferenceRunConfig)
        else "rows"
    )
    details = (f"Tokens of data.train's {what}:", *_bars(lengths))
    if max([*cut.values(), 0]) > NOTABLE * rows or skipped > NOTABLE * (rows + skipped):
        limit = (
            "preference.max_*_tokens"
            if isinstance(config, PreferenceRunConfig)
            else "data.max_length"
        )
        return Finding(
            "lengths",
            "warning",
            found,
            f"raise {limit}, or look at what is left out",
            details=details,
        )
    return Finding("lengths", "ok", found, details=details)


def judge_division(dataset: TokenDataset, config: RunConfig) -> Finding:
    """How ranks that divide rows (`train.sequence_parallel`) take attention heads and the training
    rows, and whether the division fits both. Raises UserError where the model's rows cannot be
    divided so."""
    parts = config.train.sequence_parallel
    settings = read_settings(config.model.name_or_path)
    check_divided_rows(settings, parts)
    shares = HeadShares.of_model(settings, parts)
    longest, limit = dataset.longest, longest_rows(config).tokens
    found = (
        f"{shares.told}; the longest training row has {longest} tokens of the {limit} that are "
        f"allowed, {-(-longest // parts)} for each; rows are padded to multiples of {parts}, by "
        f"{plural(parts - 1, 'token')} at most"
    )
    fix = ""
    if longest * parts <= limit:
        fix = (
            "whole rows are no longer than a rank's part of the longest that is allowed: "
            "train.sequence_parallel=1 would do"
        )
    elif shares.idle > NOTABLE_WAITING:
        divisors = [each for each in range(2, shares.heads + 1) if shares.heads % each == 0]
        fix = f"with train.sequence_parallel one of {', '.join(map(str, divisors))} none waits"
    return Finding("divided rows", "warning" if fix else "ok", found, fix)


def check_overlap(splits: Splits) -> Finding:
    """That no row of one part stands in another."""
    shared = list(shared_rows(splits.named()))
    if shared:
        counts = Counter((row.part, row.other) for row in shared)
        how_many = ", ".join(
            f"{plural(count, 'row')} of {other} in {part}"
            for (part, other), count in counts.items()
        )
        firsts = {(row.part, row.other): row for row in reversed(shared)}
        places = "; ".join(f"{row.other_place} is {row.place}" for row in reversed(firsts.values()))
        return Finding(
            "overlap", "failed", f"{how_many}; {places}", "take them out of one of the two"
        )
    return Finding("overlap", "ok", f"no row is in two of {', '.join(splits.named())}")


def _responses(batch: Batch, dataset: TokenDataset, config: RunConfig) -> Iterator[Response]:
    """Every response of a micro-batch."""
    rows = batch["rows"].tolist()
    for number, row in enumerate(rows):
        inside = batch["document_ids"] == number
        ids, labels = batch["input_ids"][inside].tolist(), batch["labels"][inside].tolist()
        _, mask = dataset[row][number - rows.index(row)]
        borders = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
        runs = list(zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True))
        for start, end in runs:
            at_limit = len(ids) >= config.data.max_length
            if isinstance(config, PreferenceRunConfig):
                at_limit = len(ids) - runs[0][0] >= config.preference.max_response_tokens
            yield Response(ids, labels, start, end, at_limit and end == len(ids))


def _problem(
    response: Response, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> str | None:
    """What is wrong with the end of a response, or None."""
    span = (response.start, response.end)
    last = last_said(response.ids, span, stops, tokenizer)
    token = response.ids[last]
    if token in stops and response.labels[last] != token:
        quoted = tokenizer.convert_ids_to_tokens(token)
        return f"the label of the end-of-turn token {quoted} is lost in collation"
    return None if response.is_cut else ending(response.ids, span, stops, tokenizer)


def _bars(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
    """A line for each range of lengths, of the same round width, from the shortest row on."""
    width = _round_up((int(lengths.max()) - int(lengths.min())) / BARS)
    counts = np.bincount((lengths - 1) // width)
    lines = []
    for number in range((int(lengths.min()) - 1) // width, len(counts)):
        count = int(counts[number])
        bar = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        span = f"{number * width + 1:>7}-{(number + 1) * width:<7}"
        lines.append(f"{span} {bar:<{BAR_WIDTH}} {count:>8} {count / len(lengths):>6.1%}")
    return lines


def _round_up(value: float) -> int:
    """The next of 1, 2, 4, 5, 8, 10, 20, 40, 50, 80, ..."""
    power = 1
    while True:
        for digit in (1, 2, 4, 5, 8):
            if digit * power >= value:
                return digit * power
        power *= 10
