"""What a model's `config.json` alone can tell before any weight is read: whether it can be trained
and valued here."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

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


def check_attention(
    config: PretrainedConfig, implementation: str, dtype: str, *, here: bool = True
) -> None:
    """Refuses an attention kernel that the model, its dtype or, if `here`, this machine cannot run
    (UserError)."""
    model_class, setting = _model_class(config), f"model.attn_implementation={implementation}"
    softcap = getattr(
        config.get_text_config(), "attn_logit_softcapping", None
    )  # some versions would drop it silently
    if implementation == "sdpa" and (softcap is not None or not model_class._supports_sdpa):
        raise UserError(
            f"{setting} is not possible with {model_class.__name__}: set "
            "model.attn_implementation=eager"
        )
    if implementation == "flash_attention_2":
        if not model_class._supports_flash_attn:
            raise UserError(
                f"{setting} is not possible with {model_class.__name__}: set it to sdpa or eager"
            )
        if dtype != "bfloat16":
            raise UserError(f"{setting} needs model.dtype=bfloat16, not {dtype}")
        if here and not is_flash_attn_2_available():
            raise UserError(
                f"{setting} needs a CUDA device and flash-attn: pip install 'alphatoken[flash]'"
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
