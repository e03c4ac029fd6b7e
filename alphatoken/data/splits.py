"""The three parts of a run's data, checked against each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from alphatoken.config import RunConfig, Source
from alphatoken.config_preference import PreferenceRunConfig
from alphatoken.data.batches import Indices, Order
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoder, PromptEncoder, RowEncoder
from alphatoken.data.pairs import ChosenEncoder, PairEncoder
from alphatoken.errors import UserError


@dataclass(frozen=True)
class Splits:
    """`validation` steers the values, `eval` is what is reported; neither shares a row with another part."""

    train: TokenDataset
    validation: TokenDataset | None
    eval: TokenDataset | None

    def named(self) -> dict[str, TokenDataset]:
        parts = {"data.train": self.train, "data.validation": self.validation, "data.eval": self.eval}
        return {name: part for name, part in parts.items() if part is not None}


def load_splits(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Reads and tokenises all parts. Raises UserError for bad rows, too few of them, or a row in two parts."""
    rows, examples = _encoders(config, tokenizer)

    def load(sources: list[Source] | None, encoder: RowEncoder) -> TokenDataset | None:
        return None if sources is None else tokenise(sources, encoder, config.data.cache_dir)

    train = load(config.data.train, rows)
    assert train is not None
    validation = load(config.data.validation, examples) if config.valuation.enabled else None
    splits = Splits(train, validation, load(config.data.eval, rows))
    if len(train) < config.train.global_batch_size:
        raise UserError(
            f"data.train has {len(train)} usable rows, fewer than train.global_batch_size="
            f"{config.train.global_batch_size}"
        )
    if validation is not None and len(validation) < config.valuation.validation_sequences:
        raise UserError(
            f"data.validation has {len(validation)} usable rows, fewer than valuation.validation_sequences="
            f"{config.valuation.validation_sequences}; lower the latter or add rows"
        )
    _refuse_shared_rows(splits.named())
    return splits


def _encoders(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[RowEncoder, RowEncoder]:
    """For the rows that are trained on and evaluated, and for held-out examples."""
    examples = Encoder(tokenizer, config.data.max_length)
    if not isinstance(config, PreferenceRunConfig):
        return examples, examples
    lengths = config.preference.max_prompt_tokens, config.preference.max_response_tokens
    pairs = PairEncoder(tokenizer, *lengths)
    return pairs, ChosenEncoder(pairs, examples)


@dataclass(frozen=True)
class Prompts:
    """What the Fisher is estimated on: `rows` of a dataset, as many as were asked for if there are."""

    dataset: TokenDataset
    rows: Indices
    trained_on: int
    """How many were left out because `data.train` has them."""

    def __str__(self) -> str:
        left_out = f" ({self.trained_on} left out: trained on)" if self.trained_on else ""
        return f"{len(self.rows)} prompts of {', '.join(report.path for report in self.dataset.reports)}{left_out}"


def load_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, train: TokenDataset) -> Prompts:
    """Prompts alone where completions are sampled, else prompts with responses, in an order that depends on the seed.

    Raises UserError for bad rows, or when all prompts are trained on.
    """
    sources = config.fisher.prompts or config.data.validation
    assert sources is not None, "valuation needs data.validation"
    _, encoder = _encoders(config, tokenizer)
    if config.fisher.sampling == "rollout":
        encoder = PromptEncoder(tokenizer, config.fisher.max_prompt_tokens)
    dataset = tokenise(sources, encoder, config.data.cache_dir)
    trained_on = np.isin(dataset.last_asked(), train.asked())
    epoch = Order(dataset.sizes, dataset.weights, (config.fisher.seed, 2)).step(0, len(dataset))
    _, first = np.unique(epoch, return_index=True)  # a mixture with weights repeats rows
    distinct = epoch[np.sort(first)]
    rows = distinct[~trained_on[distinct]][: config.fisher.num_prompts]
    if len(rows) == 0:
        raise UserError(
            f"the Fisher needs prompts that are not trained on, but data.train has all those of {sources[0].path}; "
            "set fisher.prompts to other rows"
        )
    return Prompts(dataset, rows, int(trained_on.sum()))


def _refuse_shared_rows(parts: dict[str, TokenDataset]) -> None:
    names = list(parts)
    for position, name in enumerate(names):
        for other in names[position + 1 :]:
            (digests, rows), (other_digests, other_rows) = parts[name].digests(), parts[other].digests()
            for found in np.flatnonzero(np.isin(other_digests, digests)):
                row = int(other_rows[found])
                twin = int(rows[np.flatnonzero(digests == other_digests[found])[0]])
                pairs = itertools.product(parts[name][twin], parts[other][row])
                if any(np.array_equal(ids, other_ids) for (ids, _), (other_ids, _) in pairs):
                    raise UserError(
                        f"{other} must be held out, but {parts[other].location(row)} is also in {name}: "
                        f"{parts[name].location(twin)}"
                    )
