"""A model's tokenizer, and the tokens at which it stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.chat_template import ChatRules, training_template
from alphatoken.data.pretrained import embeddings_of
from alphatoken.data.templates import shipped_names, shipped_template
from alphatoken.data.turns import Renderer
from alphatoken.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"  # where older tokenizers keep their chat template


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the configured chat template and a padding token that has an
    embedding. Raises UserError without one, without a model, and for a template of nothing, which
    would be taken for none."""
    embeddings = embeddings_of(config.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: no tokenizer can be loaded: {error}"
        ) from None
    if config.chat_template is not None:
        tokenizer.chat_template = _chosen_template(config.chat_template, tokenizer)
    elif _is_blank(tokenizer.chat_template):
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its chat template, "
            f"{_own_template(config.name_or_path)}, is empty: fetch the model again, or set "
            f"model.chat_template; those that ship are {', '.join(shipped_names())}"
        )
    pad = tokenizer.pad_token_id
    if pad is None or (pad >= embeddings and not config.resize_embeddings):
        tokenizer.pad_token = tokenizer.eos_token  # padding has no label, so EOS keeps its own
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many embeddings a model needs for every token to have one."""
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def vocabulary_note(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What becomes of tokens that the model as published has no embedding for; None where it has
    one for each, as asked for."""
    tokens, embeddings = tokens_of(tokenizer), embeddings_of(config.name_or_path)
    if config.resize_embeddings:
        grown = (
            f"from {embeddings} to {tokens}, new ones are the mean of the others"
            if tokens > embeddings
            else f"by none: the model has {embeddings}, the tokenizer {tokens} tokens"
        )
        return f"model.resize_embeddings: embeddings grow {grown}"
    if tokens <= embeddings:
        return None
    return (
        f"the tokenizer has {tokens} tokens, the model {embeddings} embeddings: no row uses the "
        f"others, and padding is {tokenizer.pad_token}"
    )


def _is_blank(template: str | dict[str, str] | None) -> bool:
    """Whether a tokenizer's template, or its default of several, is there and holds nothing."""
    default = template.get("default") if isinstance(template, dict) else template
    return default is not None and not default.strip()


def _own_template(name: str) -> Path:
    """Where a model's own chat template is read from."""
    file = Path(name) / "chat_template.jinja"
    return file if file.is_file() or not Path(name).is_dir() else file.with_name(TOKENIZER_CONFIG)


def _chosen_template(chosen: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template of the tokenizer's, of a file or of those that ship, looked for in that order."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    named = f"; the tokenizer's own are {', '.join(sorted(own))}" if own else ""
    others = f"{named}; those that ship are {', '.join(shipped_names())}"
    try:
        is_own = str(chosen) in own
        found = str(own[str(chosen)]) if is_own else chosen.read_text(encoding="utf-8")
    except OSError as error:
        if str(chosen) in shipped_names():
            return shipped_template(str(chosen))
        raise UserError(
            f"cannot read model.chat_template={chosen}: {error.strerror}{others}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"model.chat_template={chosen} is not text in UTF-8: {error}; save it as that{others}"
        ) from None
    if not found.strip():
        raise UserError(
            f"model.chat_template={chosen} is empty: write a template into it, or leave the key "
            f"out{others}"
        )
    return found


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[int]:
    """The tokenizer's EOS and the tokens that stop generation."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*own, *generation_stops(generation)})


def generation_stops(generation: GenerationConfig | None) -> list[int]:
    """The tokens that stop generation, in their order."""
    stops: Any = generation.eos_token_id if generation is not None else None
    return list(stops) if isinstance(stops, list) else [stops] if stops is not None else []


def stop_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn: `eos_token_ids` of the model, which need not be loaded, and its
    `end_of_turn`."""
    known = eos_token_ids(tokenizer, _published(config))
    end = end_of_turn(config, tokenizer)
    return sorted({*known} if end is None else {*known, end})


def end_of_turn(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends the assistant's turns in the rows: `model.end_of_turn`, else what the
    chat template ends them with, or EOS without a template; None where that is text.

    Raises UserError where `model.end_of_turn` is no token, or not what the template ends them with.
    """
    configured = config.end_of_turn
    token: int | None = None if configured is None else tokenizer.get_vocab().get(configured)
    if configured is not None and token is None:
        raise UserError(
            f"model.end_of_turn={configured} is no token of {config.name_or_path}: name one, such "
            f"as {tokenizer.eos_token}"
        )
    found: int | None = tokenizer.eos_token_id
    if tokenizer.chat_template is not None:
        known = eos_token_ids(tokenizer, _published(config))
        rules = ChatRules(
            stop_tokens=frozenset(known if token is None else [*known, token]),
            variables=config.chat_template_kwargs,
            today=config.chat_template_date,
        )
        own = Renderer(tokenizer, rules).end_of_turn()
        found = token if own is None else own
    if token is not None and token != found:
        ends = "the chat template ends turns" if tokenizer.chat_template else "rows end"
        raise UserError(
            f"model.end_of_turn={configured}, but {ends} with "
            f"{tokenizer.convert_ids_to_tokens(found)}: leave it out, or set model.chat_template "
            f"to one that ends them with {configured}"
        )
    return found


def stop_at_end_of_turn(
    generation: GenerationConfig, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Has a model stop at the end of a turn, where it does not yet; what is to be said of that."""
    token = end_of_turn(config, tokenizer)
    stops = generation_stops(generation)
    if token is None or (token in stops and config.end_of_turn is None):
        return None
    name, eos = tokenizer.convert_ids_to_tokens(token), tokenizer.eos_token
    whose = "as model.end_of_turn says" if config.end_of_turn else "as rows are rendered"
    others = tokenizer.convert_ids_to_tokens(stops)
    if token not in stops:
        generation.eos_token_id = [*stops, token]
    return (
        f"turns end with {name}, {whose} (EOS is {eos}; as published, generation stops at "
        f"{', '.join(others) or 'none'}): protect_eos protects it, and the exported "
        "generation_config.json stops at it"
    )


def _published(config: ModelConfig) -> GenerationConfig:
    """How a model generates, as loading it gives it."""
    try:
        return GenerationConfig.from_pretrained(config.name_or_path)
    except OSError:  # as loading does where there is no such file
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(config.name_or_path))


def chat_rules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatRules:
    """How a run has its conversations rendered."""
    rules = ChatRules(
        stop_tokens=frozenset(stop_tokens(config.model, tokenizer)),
        variables=config.model.chat_template_kwargs,
        turns=config.data.turns,
        train_reasoning=config.data.train_reasoning,
        today=config.model.chat_template_date,
    )
    if config.model.chat_template is not None or not isinstance(tokenizer.chat_template, str):
        return rules
    return replace(rules, training_template=training_template(tokenizer, rules))
