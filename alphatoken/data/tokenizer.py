"""A model's tokenizer, and the tokens at which it stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.templates import shipped_names, shipped_template
from alphatoken.data.turns import ChatRules, training_template
from alphatoken.errors import UserError


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token and the configured chat template. Raises
    UserError without one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: no tokenizer can be loaded: {error}"
        ) from None
    if config.chat_template is not None:
        tokenizer.chat_template = _chosen_template(config.chat_template, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding has no label, so EOS keeps its own
    return tokenizer


def _chosen_template(chosen: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template of the tokenizer's, of a file or of those that ship, looked for in that order."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if str(chosen) in own:
        return str(own[str(chosen)])
    try:
        return chosen.read_text(encoding="utf-8")
    except OSError as error:
        if str(chosen) in shipped_names():
            return shipped_template(str(chosen))
        named = f"; the tokenizer's own are {', '.join(sorted(own))}" if own else ""
        raise UserError(
            f"cannot read model.chat_template={chosen}: {error.strerror}{named}; those that ship "
            f"are {', '.join(shipped_names())}"
        ) from None


def eos_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[int]:
    """Every token that ends a turn: the tokenizer's and those that stop generation."""
    stops: Any = generation.eos_token_id if generation is not None else None
    return sorted(
        {
            tokenizer.eos_token_id,
            *(stops if isinstance(stops, list) else [stops] if stops is not None else []),
        }
    )


def stop_tokens(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`eos_token_ids` of a model that is not loaded."""
    try:
        generation = GenerationConfig.from_pretrained(config.name_or_path)
    except OSError:  # as loading does where there is no such file
        generation = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(config.name_or_path)
        )
    return eos_token_ids(tokenizer, generation)


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
