"""What a model's `config.json` alone can tell before any weight is read: whether it can be trained
and valued here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from alphatoken.errors import UserError
from alphatoken.models.architectures import ARCHITECTURES, Architecture, architecture_named
from alphatoken.models.scored import scored_depth

# Names under which Hugging Face configs keep dropout probabilities.
DROPOUT_FIELDS = (
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
)


def architecture_of_config(config: PretrainedConfig) -> Architecture:
    """The architecture that a `config.json` will be loaded as. Raises UserError where there is
    none."""
    return architecture_named(_model_class(config).__name__)


@dataclass(frozen=True)
class FlashKernel:
    """A flash attention that `transformers` can run, and what it needs."""

    is_installed: Callable[[], bool]
    install: str
    """What to type where it is not."""
    generations: range
    """CUDA devices that it is built for, by the major number of their compute capability."""


AMPERE, HOPPER, NEWEST = 8, 9, 99
FLASH_KERNELS: dict[str, FlashKernel] = {
    "flash_attention_3": FlashKernel(
        is_flash_attn_3_available,
        "build flash_attn_3 from the folder hopper of the flash-attention repository",
        range(AMPERE, HOPPER + 1),
    ),
    "flash_attention_2": FlashKernel(
        is_flash_attn_2_available, "pip install 'alphatoken[flash]'", range(AMPERE, NEWEST)
    ),
    "kernels-community/flash-attn3": FlashKernel(
        is_kernels_available, "pip install kernels", range(AMPERE, HOPPER + 1)
    ),
    "kernels-community/flash-attn2": FlashKernel(
        is_kernels_available, "pip install kernels", range(AMPERE, NEWEST)
    ),
}
LARGEST_FLASH_HEAD = 256

BEST_FIRST = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
"""What `model.attn_implementation: auto` stands for: the first of these that is possible. Nothing
is fetched from the hub for it."""


def cuda_generation() -> int | None:
    """The major number of this machine's compute capability; None without a CUDA device."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


def best_attention(config: PretrainedConfig, dtype: str) -> str:
    """The fastest attention kernel that the model, its dtype and this machine can run."""
    *others, last = BEST_FIRST
    for implementation in others:
        try:
            check_attention(config, implementation, dtype)
        except UserError:
            continue
        return implementation
    return last


def check_attention(
    config: PretrainedConfig, implementation: str, dtype: str, *, here: bool = True
) -> None:
    """Refuses an attention kernel that the model, its dtype or, if `here`, this machine cannot run
    (UserError). `auto` can always be run."""
    model_class, setting = _model_class(config), f"model.attn_implementation={implementation}"
    text = config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)  # some versions would drop it silently
    if implementation == "sdpa" and (softcap is not None or not model_class._supports_sdpa):
        raise UserError(
            f"{setting} is not possible with {model_class.__name__}: set "
            "model.attn_implementation=eager"
        )
    if implementation not in FLASH_KERNELS:
        return
    if not model_class._supports_flash_attn:
        raise UserError(
            f"{setting} is not possible with {model_class.__name__}: set it to sdpa or eager"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head > LARGEST_FLASH_HEAD:
        raise UserError(
            f"{setting} is not possible with heads of size {head}, above {LARGEST_FLASH_HEAD}: set "
            "it to sdpa or eager"
        )
    if dtype != "bfloat16":
        raise UserError(f"{setting} needs model.dtype=bfloat16, not {dtype}")
    if here:
        _check_flash_here(FLASH_KERNELS[implementation], setting)


def _check_flash_here(kernel: FlashKernel, setting: str) -> None:
    generation, wanted = cuda_generation(), kernel.generations
    if generation is None or not kernel.is_installed():
        raise UserError(f"{setting} needs a CUDA device and its package: {kernel.install}")
    if generation not in wanted:
        between = f"{wanted.start} to {wanted[-1]}" if wanted[-1] < NEWEST - 1 else wanted.start
        raise UserError(
            f"{setting} needs a device of compute capability {between}, not {generation}: set it "
            "to auto"
        )


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    try:
        model_class: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UserError(
            f"model type {config.model_type!r} is not a causal language model; supported classes: "
            f"{', '.join(ARCHITECTURES)}"
        ) from None
    return model_class


def check_divided_rows(config: PretrainedConfig, parts: int) -> None:
    """Refuses, from `config.json` alone, a model whose rows cannot be divided over `parts` ranks.
    Raises UserError."""
    setting = f"train.sequence_parallel={parts}"
    if architecture_of_config(config).recurrent:
        raise UserError(
            f"{setting} is not possible with {config.model_type}: its linear-attention layers "
            "carry a state along the row, from one rank's part into the next; set it to 1"
        )
    heads = config.get_text_config().num_attention_heads
    if parts > heads:
        raise UserError(
            f"{setting} is more than the {heads} attention heads of the model, of which every rank "
            f"takes some: set it to {heads} at most"
        )


def check_valuation(config: PretrainedConfig, layers: int | str) -> None:
    """Refuses, from `config.json` alone, a model that cannot be valued on its last `layers`. Raises
    UserError."""
    text = config.get_text_config()
    scored_depth(layers, text.num_hidden_layers)
    for field in DROPOUT_FIELDS:
        probability: Any = getattr(text, field, 0.0)
        if probability:
            raise UserError(
                f"the model's config.json has {field}={probability}: with dropout, scoring and "
                "training would see different networks; set it to 0, or valuation.enabled=false"
            )
