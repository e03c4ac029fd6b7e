"""Where a Hugging Face causal LM keeps its decoder layers, final norm, head and scored linears.

One `Architecture` per supported model class; `docs/architectures.md` says how to add one.
Everything else in the library speaks of a `Decoder`, which is one architecture applied to one
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from alphatoken.errors import UserError


def _last_third(config: PretrainedConfig) -> Tensor:
    """Value rows of a projection that stacks equally many query, key and value rows."""
    return torch.arange(2 * config.hidden_size, 3 * config.hidden_size)


def _after_queries_and_keys(config: PretrainedConfig) -> Tensor:
    """Value rows of a projection that stacks query, key and value rows of grouped-query
    attention."""
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    start = (config.num_attention_heads + config.num_key_value_heads) * head_size
    return torch.arange(start, start + config.num_key_value_heads * head_size)


def _third_of_each_head(config: PretrainedConfig) -> Tensor:
    """Value rows of a projection that stacks query, key and value head by head."""
    head_size = config.hidden_size // config.num_attention_heads
    rows = torch.arange(3 * config.hidden_size).view(config.num_attention_heads, 3, head_size)
    return rows[:, 2].flatten()


@dataclass(frozen=True)
class Architecture:
    """Dotted paths inside a model class. `layers` and `norm` are inside `body`; the rest inside a
    layer."""

    linears: tuple[str, ...]
    """Every linear that a layer may have and that is scored, in order of the forward pass."""
    value_projection: str
    """The linear through which attention carries the causal path; layers without it have no causal
    term."""
    value_rows: Callable[[PretrainedConfig], Tensor] | None = None
    """Which of its output rows are values, where query and key share it."""
    body: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    unscored: tuple[str, ...] = ()
    """Parts of a layer with weights that are left out of the scored set (experts and their router).
    """
    recurrent: bool = False
    """Whether some layers carry a state along the row, so that documents cannot be packed into one.
    """
    head_first_norms: tuple[str, ...] = ()
    """Norms of heads that see (B, heads, T, F) rather than (B, T, heads, F)."""
    external_weights: tuple[tuple[str, str], ...] = ()
    """(part of a layer, weight inside it) that the part reads without calling its module, as ZeRO-3
    wants."""


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LLAMA_LIKE = Architecture(linears=(*ATTENTION, *GATED_MLP), value_projection="self_attn.v_proj")
GEMMA3 = replace(LLAMA_LIKE, head_first_norms=("self_attn.q_norm", "self_attn.k_norm"))

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        (
            *(
                "LlamaForCausalLM",
                "MistralForCausalLM",
                "Qwen2ForCausalLM",
                "Qwen3ForCausalLM",
                "Gemma2ForCausalLM",
            ),
            *("Olmo2ForCausalLM", "SmolLM3ForCausalLM"),
        ),
        LLAMA_LIKE,
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, body="model.language_model"),
    "Qwen3_5ForCausalLM": replace(
        LLAMA_LIKE,
        linears=(
            *(
                "linear_attn.in_proj_qkv",
                "linear_attn.in_proj_z",
                "linear_attn.in_proj_b",
                "linear_attn.in_proj_a",
            ),
            *("linear_attn.out_proj", *ATTENTION, *GATED_MLP),
        ),
        recurrent=True,
        external_weights=(("linear_attn", "conv1d.weight"),),
    ),
    "Phi3ForCausalLM": Architecture(
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        value_projection="self_attn.qkv_proj",
        value_rows=_after_queries_and_keys,
    ),
    "GPTNeoXForCausalLM": Architecture(
        linears=(
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        value_projection="attention.query_key_value",
        value_rows=_third_of_each_head,
        body="gpt_neox",
        norm="final_layer_norm",
    ),
    "GPT2LMHeadModel": Architecture(
        linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        value_projection="attn.c_attn",
        value_rows=_last_third,
        body="transformer",
        layers="h",
        norm="ln_f",
    ),
    **dict.fromkeys(
        ("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
        replace(LLAMA_LIKE, unscored=("mlp.experts", "mlp.gate")),
    ),
}


def architecture_named(model_class: str) -> Architecture:
    if model_class not in ARCHITECTURES:
        raise UserError(
            f"model class {model_class} has no entry in alphatoken/models/architectures.py, which "
            "must say where its layers, norm and linears are (docs/architectures.md shows how to "
            f"add it); supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_class]
