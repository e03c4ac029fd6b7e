"""The three parts of a run's data, checked against each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source
from alphatoken.data.batches import Indices, Order
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoder, PromptEncoder, RowEncoder
from alphatoken.data.pairs import ChosenEncoder, HeldOutPairEncoder, PairEncoder
from alphatoken.data.pretrained import embeddings_of, read_settings
from alphatoken.data.tokenizer import chat_rules, tokens_of
from alphatoken.errors import UserError


@dataclass(frozen=True)
class Splits:
    """`validation` steers the values, `eval` is what is reported; neither shares a row with another
    part."""

    train: TokenDataset
    validation: TokenDataset | None
    eval: TokenDataset | None

    def named(self) -> dict[str, TokenDataset]:
        parts = {
            "data.train": self.train,
            "data.validation": self.validation,
            "data.eval": self.eval,
        }
        return {name: part for name, part in parts.items() if part is not None}


def load_splits(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Reads and tokenises all parts. Raises UserError for bad rows, too few of them, or a row in
    two parts."""
    splits = read_splits(config, tokenizer)
    check_sizes(splits, config)
    shared = next(shared_rows(splits.named()), None)
    if shared is not None:
        raise UserError(str(shared))
    return splits


def read_splits(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Reads and tokenises all parts, and compares nothing. Raises UserError for bad rows."""
    encoders = _encoders(config, tokenizer)

    def load(sources: list[Source] | None, encoder: RowEncoder) -> TokenDataset | None:
        return None if sources is None else _tokenised(sources, encoder, config)

    train = load(config.data.train, encoders.rows)
    assert train is not None
    held_out = config.data.validation if config.valuation.enabled else None
    splits = Splits(
        train=train,
        validation=load(held_out, encoders.held_out),
        eval=load(config.data.eval, encoders.rows),
    )
    for name, part in splits.named().items():
        _check_tokens(name, part, config, tokenizer)
    return splits


def _check_tokens(
    name: str, part: TokenDataset, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises UserError for a row with a token that the model, or the reference, has no embedding
    for."""
    if config.model.resize_embeddings:
        return
    models = {"model.name_or_path": config.model.name_or_path}
    if config.needs_reference and config.reference.model is not None:
        models["reference.model"] = config.reference.model
    tokens = tokens_of(tokenizer)
    for key, model in models.items():
        embeddings = embeddings_of(model, key)
        found = part.first_beyond(embeddings) if tokens > embeddings else None
        if found is not None:
            row, token = found
            raise UserError(
                f"{name}: {part.location(row)} has the token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} of id {token}, but {key}={model} has "
                f"{embeddings} embeddings, and its tokenizer {tokens} tokens: set "
                "model.resize_embeddings=true, which adds the missing ones, or use the tokenizer "
                "that the model was published with"
            )


def positions_note(config: RunConfig, splits: Splits) -> str | None:
    """What becomes of rows that are longer than the model has positions; None where there are none.
    Raises UserError where positions are learned, so that it knows no others."""
    text = read_settings(config.model.name_or_path).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    longest = {name: part.longest for name, part in splits.named().items()}
    name = max(longest, key=lambda each: longest[each])
    if positions is None or longest[name] <= positions:
        return None
    found = (
        f"{name} has rows of up to {longest[name]} tokens, and {config.model.name_or_path} "
        f"{positions} positions (max_position_embeddings of its config.json)"
    )
    is_pairs = isinstance(config, PreferenceRunConfig)
    lower = "lower " + (
        "preference.max_prompt_tokens and max_response_tokens" if is_pairs else "data.max_length"
    )
    if getattr(text, "rope_parameters", None) is None:
        raise UserError(f"{found}, each with an embedding of its own: {lower}")
    return (
        f"{found}: beyond them its rotary embedding goes on as before, which it was not trained "
        f"for; set rope_parameters there (YaRN, for one), or {lower}"
    )


def _tokenised(sources: list[Source], encoder: RowEncoder, config: RunConfig) -> TokenDataset:
    return tokenise(sources, encoder, config.data.cache_dir, config.data.workers)


def check_sizes(splits: Splits, config: RunConfig) -> None:
    """Raises UserError where a part has fewer rows than are drawn at once."""
    train, validation, valuation = splits.train, splits.validation, config.valuation
    if len(train) < config.train.global_batch_size:
        raise UserError(
            f"data.train has {len(train)} usable rows, fewer than "
            f"train.global_batch_size={config.train.global_batch_size}"
        )
    served = valuation.refresh_every * config.train.global_batch_size
    needed = served + valuation.validation_sequences
    if valuation.enabled and valuation.held_out == "train" and len(train) < needed:
        raise UserError(
            f"data.train has {len(train)} usable rows, but with valuation.held_out=train it needs "
            f"{needed}: valuation.refresh_every={valuation.refresh_every} times "
            f"train.global_batch_size={config.train.global_batch_size} that are trained on, and "
            f"valuation.validation_sequences={valuation.validation_sequences} others; lower these, "
            "or add rows"
        )
    if valuation.enabled and valuation.contrast:
        held_out = valuation.validation_sequences if valuation.held_out == "train" else 0
        check_rows_of_b(config, len(train), len(train) - served - held_out)
    if validation is not None and len(validation) < config.valuation.validation_sequences:
        raise UserError(
            f"data.validation has {len(validation)} usable rows, fewer than "
            f"valuation.validation_sequences={config.valuation.validation_sequences}; lower the "
            "latter or add rows"
        )


def check_rows_of_b(config: RunConfig, rows: int, others: int) -> None:
    """Raises UserError where B (`valuation.contrast`) finds too few rows: `others` of the `rows`
    training rows are neither scored before the next refresh nor held out."""
    valuation, halves = config.valuation, config.valuation.reliability
    if others < (2 if halves else 1):
        both = " (a row in each half, with valuation.reliability)" if halves else ""
        raise UserError(
            f"valuation.contrast={valuation.contrast} needs training rows other than "
            f"those being scored{both}, but data.train has {rows}, and the "
            f"{valuation.refresh_every} optimizer steps between refreshes "
            f"(valuation.refresh_every) take {config.train.global_batch_size} each "
            "(train.global_batch_size): lower these, or add rows. Without contrast go "
            "selection.keep_ratio=0.5 (the best half as published) and valuation.enabled=false "
            "(all tokens)"
        )


@dataclass(frozen=True)
class _Encoders:
    """How rows become tokens."""

    rows: RowEncoder
    """Rows that are trained on and evaluated."""
    held_out: RowEncoder
    """Held-out rows, which values are measured by."""
    examples: RowEncoder
    """Rows with a prompt and one response, which the Fisher is estimated on."""


def _encoders(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> _Encoders:
    rules = chat_rules(config, tokenizer)
    examples = Encoder(tokenizer, config.data.max_length, rules)
    if not isinstance(config, PreferenceRunConfig):
        return _Encoders(rows=examples, held_out=examples, examples=examples)
    lengths = config.preference.max_prompt_tokens, config.preference.max_response_tokens
    pairs = PairEncoder(tokenizer, *lengths, rules)
    chosen = ChosenEncoder(pairs, examples)
    compares = config.valuation.target == "preference"
    return _Encoders(
        rows=pairs,
        held_out=HeldOutPairEncoder(tokenizer, *lengths, rules) if compares else chosen,
        examples=chosen,
    )


@dataclass(frozen=True)
class Prompts:
    """What the Fisher is estimated on: `rows` of a dataset, as many as were asked for if there
    are."""

    dataset: TokenDataset
    rows: Indices
    trained_on: int
    """How many were left out because `data.train` has them."""

    def __str__(self) -> str:
        left_out = f" ({self.trained_on} left out: trained on)" if self.trained_on else ""
        return (
            f"{len(self.rows)} prompts of "
            f"{', '.join(report.path for report in self.dataset.reports)}{left_out}"
        )


def load_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, train: TokenDataset
) -> Prompts:
    """Prompts alone where completions are sampled, else prompts with responses, in an order that
    depends on the seed.

    Raises UserError for bad rows, or when all prompts are trained on.
    """
    sources = config.fisher.prompts or config.data.validation
    assert sources is not None, "valuation needs data.validation"
    encoder = _encoders(config, tokenizer).examples
    if config.fisher.sampling == "rollout":
        rules = chat_rules(config, tokenizer)
        encoder = PromptEncoder(tokenizer, config.fisher.max_prompt_tokens, rules)
    dataset = _tokenised(sources, encoder, config)
    _check_tokens("fisher.prompts", dataset, config, tokenizer)
    trained_on = np.isin(dataset.last_asked(), train.asked())
    epoch = Order(dataset.sizes, dataset.weights, (config.fisher.seed, 2)).step(0, len(dataset))
    _, first = np.unique(epoch, return_index=True)  # a mixture with weights repeats rows
    distinct = epoch[np.sort(first)]
    rows = distinct[~trained_on[distinct]][: config.fisher.num_prompts]
    if len(rows) == 0:
        raise UserError(
            "the Fisher needs prompts that are not trained on, but data.train has all those of "
            f"{sources[0].path}; set fisher.prompts to other rows"
        )
    return Prompts(dataset, rows, int(trained_on.sum()))


@dataclass(frozen=True)
class SharedRow:
    """A row that stands in two parts, and where."""

    part: str
    place: str
    other: str
    other_place: str

    def __str__(self) -> str:
        return (
            f"{self.other} must be held out, but {self.other_place} is also in {self.part}: "
            f"{self.place}"
        )


def shared_rows(parts: dict[str, TokenDataset]) -> Iterator[SharedRow]:
    """The rows of a later part that share a document with an earlier one, one by one."""
    for (name, part), (other_name, other) in itertools.combinations(parts.items(), 2):
        (digests, rows), (other_digests, other_rows) = part.digests(), other.digests()
        seen: set[int] = set()
        order = np.argsort(digests, kind="stable")
        for found in np.flatnonzero(np.isin(other_digests, digests)):
            row = int(other_rows[found])
            twin = int(rows[order[np.searchsorted(digests, other_digests[found], sorter=order)]])
            pairs = itertools.product(part[twin], other[row])
            if row not in seen and any(
                np.array_equal(ids, other_ids) for (ids, _), (other_ids, _) in pairs
            ):
                seen.add(row)
                yield SharedRow(name, part.location(twin), other_name, other.location(row))
