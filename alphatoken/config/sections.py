"""Run configuration: one frozen pydantic model per YAML section. Unknown keys are errors; every
field says why. `valuation` and `selection` have modules of their own."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alphatoken.config.choices import OneOf


def _of_this_machine(value: Any) -> Any:
    """A path with its ~ filled in; other values as they are. Raises PydanticCustomError for text
    that names nothing, which a path would take for the folder it is started in."""
    if not isinstance(value, str | Path):
        return value
    if not str(value).strip():
        raise PydanticCustomError("path", "Input should be a name or path")
    try:
        found = Path(value).expanduser()
    except RuntimeError:
        owner = Path(value).parts[0]
        if owner == "~":
            raise PydanticCustomError(
                "path",
                "Input begins with ~, but this user has no home folder: set HOME, or write the "
                "whole path",
            ) from None
        raise PydanticCustomError(
            "path",
            "Input begins with the folder of {owner}, which is no user of this machine: write the "
            "whole path, or ~/ for your own folder",
            {"owner": owner},
        ) from None
    return type(value)(found) if str(value).startswith("~") else value


# Strictness keeps `every: true` from meaning 1; YAML has no paths or tuples, so those are read
# from text and lists.
FilePath = Annotated[Path, Strict(False), BeforeValidator(_of_this_machine)]
# A path, or a word or hub name, which stays as it is.
PathOrName = Annotated[str, BeforeValidator(_of_this_machine)]
Pair = Annotated[tuple[float, float], Strict(False)]

# Marks a key, or a section with all its keys, that a run and its continuation may have
# different values of, as it does not change what is computed (`config.file.may_change`).
MAY_CHANGE: dict[str, JsonValue] = {"may_change": True}


class Section(BaseModel):
    """A frozen section; `read_config` turns its validation errors into messages that name the
    nearest key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


GIVEN_TO_TEMPLATES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "documents",
    "messages",
    "return_assistant_tokens_mask",
    "tools",
}
"""What a chat template gets from each row, or from how rows are rendered."""


class LoraConfig(Section):
    r: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(
        16.0, gt=0, description="Scale of the adapters: they are multiplied by alpha / r."
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the linears that get an adapter."
    )


TODAY = datetime.date(2026, 1, 1)
"""What chat templates take for today."""
Turns = Literal["all", "last"]
"""Which of the assistant's turns are trained."""


FORMATS: dict[str, str] = {
    "auto": "any of these",
    "labels": "tokens with labels",
    "loss_mask": "tokens with a mask",
    "sharegpt_pair": "ShareGPT turns with two answers",
    "orca_pair": "two answers to a question",
    "pair": "two answers to a prompt",
    "messages": "OpenAI's and UltraChat's messages",
    "prompt_response": "a prompt and a response",
    "unpaired": "answers judged alone (refused)",
    "completion": "TRL's prompt and completion",
    "sharegpt": "ShareGPT turns",
    "alpaca": "Alpaca's instruction, input and output",
    "orca": "a question and a response",
    "problem_solution": "Magicoder's problem and solution",
    "instruction_response": "an instruction and a response",
    "two_responses": "PKU's two responses",
    "ranked": "UltraFeedback's ranked completions",
    "question_answer": "GSM8K's question and answer",
}
"""What rows may be like; `data.formats` has how each becomes ours."""


class ModelConfig(Section):
    """The model that is trained, and how it is loaded."""

    name_or_path: PathOrName = Field(
        description="Folder or hub name of the Hugging Face model to fine-tune."
    )
    chat_template: FilePath | None = Field(
        None,
        description="Jinja file to use as the tokenizer's chat template, for base models, which "
        "have none; or the name of one that ships (chatml, llama3, ...), or of one of the "
        "tokenizer's own, where it has several.",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Variables of the chat template, in every rendering, as in "
        "{enable_thinking: false}.",
    )
    chat_template_date: Annotated[datetime.date, Strict(False)] = Field(
        TODAY,
        description="What a chat template that writes today's date writes in its place, so that "
        "rows are the same tokens on every day, in every part of the data and after resuming.",
    )
    end_of_turn: str | None = Field(
        None,
        description="Token that ends the assistant's turns: what protect_eos protects, and where "
        "the exported model stops. Default: what the chat template ends them with, else EOS.",
    )
    attn_implementation: Literal[
        "auto",
        "flash_attention_3",
        "flash_attention_2",
        "kernels-community/flash-attn3",
        "kernels-community/flash-attn2",
        "sdpa",
        "eager",
    ] = Field(
        "auto",
        description="Attention kernel; values are the same with each. auto: flash attention 3 or 2 "
        "where "
        "it is installed and possible, else sdpa, else eager. The run's own config.yaml names it.",
        json_schema_extra=MAY_CHANGE,
    )
    resize_embeddings: bool = Field(
        False,
        description="Give every token of the tokenizer an embedding where the model has fewer, for "
        "added tokens: each new one starts as the mean of the others.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train LoRA adapters {r, alpha, target_modules} instead of all weights; "
        "they are "
        "then scored.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Dtype of weights and activations; the optimizer keeps float32 "
        "masters either way.",
    )

    @model_validator(mode="after")
    def _new_embeddings_are_trained(self) -> ModelConfig:
        if self.resize_embeddings and self.lora is not None:
            raise ValueError(
                "model.resize_embeddings=true, but model.lora trains no embeddings, nor would the "
                "new ones be part of the adapters: leave one of them out"
            )
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_what_rows_give(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(GIVEN_TO_TEMPLATES & value.keys()):
            raise ValueError(
                f"model.chat_template_kwargs sets {taken[0]}, which each row gives to the template"
            )
        return value


class Source(Section):
    """One file, folder or hub data set, and which of its rows are used."""

    path: PathOrName = Field(
        description="File (.jsonl, .jsonl.gz, .parquet; or .json, .csv, .tsv, .jsonl.zst, .arrow), "
        "pattern of files (part-*.jsonl), address of one, saved dataset or `datasets` name; "
        "${VARIABLES} are filled in."
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="What the source is called in the metrics of a mixture; default: the last part "
        "of its path without an ending.",
    )
    skip: int = Field(0, ge=0, description="Rows to leave out at the start.")
    first: int | None = Field(
        None, ge=1, description="Rows to use after those skipped; default: all."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Relative share of an epoch's rows; leave unset on all sources to "
        "use every row once.",
    )
    split: str = Field("train", description="Split of a `datasets` name.")
    subset: str | None = Field(None, description="Configuration of a `datasets` name.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our field to the source's, as in {prompt: problem, response: solution}.",
    )
    format: Annotated[str, OneOf(FORMATS)] = Field(
        "auto",
        description="What the rows are like (alphatoken/data/formats.py); auto: by their columns.",
    )


ENDING = re.compile(r"\.(jsonl?|ndjson|parquet|csv|tsv|arrow)(\.gz|\.zst)?$")


def source_names(sources: Sequence[Source]) -> list[str]:
    """What each source is called; where several would be called alike by their paths, with their
    place, from 1, behind it. Raises ValueError where two are named alike nevertheless."""
    short = [source.path.rstrip("/").rpartition("/")[2] for source in sources]
    names = [
        source.name or ENDING.sub("", text) or text
        for source, text in zip(sources, short, strict=True)
    ]
    alike = {name for name, count in Counter(names).items() if count > 1}
    names = [
        f"{name}-{place}" if source.name is None and name in alike else name
        for place, (source, name) in enumerate(zip(sources, names, strict=True), start=1)
    ]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"two sources of data.train are named {name!r}; change a name")
    return names


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items:
        # Not a ValueError: those are told without the key.
        raise PydanticCustomError("no_source", "leave the key out or name a source")
    return [{"path": item} if isinstance(item, str) else item for item in items]


# One path, one {path, weight, ...} mapping, or a list of either.
Sources = Annotated[
    list[Source],
    BeforeValidator(
        _as_sources,
        json_schema_input_type=str | Source | Annotated[list[str | Source], Field(min_length=1)],
    ),
]


class DataConfig(Section):
    """Rows to train on, to steer values by and to evaluate on, and how they are tokenised."""

    train: Sources = Field(
        description="Rows to train on: a path, or a list of {path, weight} for a mixture."
    )
    validation: Sources | None = Field(
        None,
        description="Held-out rows of the target task that steer the token values; never "
        "trained on.",
    )
    eval: Sources | None = Field(
        None,
        description="Rows for eval_loss, disjoint from train and validation, so that the report is "
        "honest.",
    )
    turns: Turns = Field(
        "all",
        description="Which of the assistant's turns in a conversation are trained: all, or the "
        "last. Where the chat template writes earlier turns differently once others follow, all "
        "makes a row of every turn, as inference sees it.",
    )
    train_reasoning: bool = Field(
        True,
        description="Whether the reasoning before an answer (<think>, reasoning_content) is "
        "trained with it; otherwise the model sees it and learns the answer alone.",
    )
    max_length: int = Field(
        2048,
        ge=8,
        description="Longest supervised row in tokens; longer ones are cut on the right "
        "and counted.",
    )
    packing: bool = Field(
        False,
        description="Lay the documents of a micro-batch into as few rows as fit max_length, "
        "instead of "
        "padding.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes that tokenise a source of many rows, once for all ranks that share "
        "the cache; default: as many as the process has cores, at most 16. What they make does not "
        "depend on it.",
        json_schema_extra=MAY_CHANGE,
    )
    cache_dir: FilePath = Field(
        Path("~/.cache/alphatoken"),
        validate_default=True,
        description="Where tokenised data is kept, shared by runs and ranks.",
        json_schema_extra=MAY_CHANGE,
    )

    @field_validator("train")
    @classmethod
    def _has_names(cls, value: list[Source]) -> list[Source]:
        source_names(value)
        return value


class FisherConfig(Section):
    """How the Fisher of the starting model is estimated, and where it is kept."""

    prompts: Sources | None = Field(
        None,
        description="Rows whose prompts the reference model answers, never trained on; default: "
        "data.validation.",
    )
    num_prompts: int = Field(1000, ge=1, description="Use at most so many of them (N).")
    sampling: Literal["rollout", "teacher_forced", "empirical"] = Field(
        "rollout",
        description="Whose tokens the gradients are of: completions sampled from the model, "
        "tokens it "
        "predicts along "
        "given responses (no generation), or the given responses themselves.",
    )
    square: Literal["token", "sequence"] = Field(
        "token",
        description="Square each position's gradient (published), or each sequence's: "
        "the true diagonal.",
    )
    max_prompt_tokens: int = Field(
        256, ge=1, description="Longest prompt of a rollout; longer ones are left out."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest sampled completion of a rollout.")
    batch_size: int = Field(8, ge=1, description="Prompts per pass on one rank.")
    seed: int = Field(
        0, ge=0, description="Seed of the choice of prompts and of the sampled tokens."
    )
    save_every: int = Field(
        32,
        ge=1,
        description="Passes after which an unfinished estimate is saved.",
        json_schema_extra=MAY_CHANGE,
    )
    output: FilePath | None = Field(
        None,
        description="Folder the estimate is written to; default: train.output_dir/fisher.",
        json_schema_extra=MAY_CHANGE,
    )


ReferenceMode = Literal["cached", "online"]


class ReferenceConfig(Section):
    """The model whose token losses are compared with, and where its losses are kept."""

    model: PathOrName | None = Field(
        None,
        description="Folder or hub name of the model whose token losses are compared; "
        "default: the start.",
    )
    mode: ReferenceMode = Field(
        "cached",
        description="Compute its losses of all rows once, before training, or keep it loaded "
        "(sharded like "
        "the model) "
        "and run it on every micro-batch.",
    )
    offload: bool = Field(
        False,
        description="online: keep its shards in host memory while it does not run.",
        json_schema_extra=MAY_CHANGE,
    )
    cache: FilePath | None = Field(
        None,
        description="Folder of the cached losses, refused if it is of other data, lengths, "
        "tokenizer or "
        "model; "
        "default: one under data.cache_dir for each combination of these.",
        json_schema_extra=MAY_CHANGE,
    )
    save_every: int = Field(
        1024,
        ge=1,
        description="Rows after which unfinished cached losses are saved.",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _mode_reads_its_keys(self) -> ReferenceConfig:
        if self.offload and self.mode == "cached":
            raise ValueError(
                "reference.offload=true: only reference.mode=online keeps a reference to offload"
            )
        if self.cache is not None and self.mode == "online":
            raise ValueError(f"reference.cache={self.cache}: reference.mode=online caches nothing")
        return self


def as_reference(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value
