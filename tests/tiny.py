"""Tiny random models of every supported architecture, and batches for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken.batch import Batch, RowIndex

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MIXED_WINDOWS = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 5}


@dataclass(frozen=True)
class TinyCase:
    """How the oracle finds its way in one architecture; written apart from
    `alphatoken.architectures`."""

    build: Callable[[], PreTrainedModel]
    layer_prefix: str = "model.layers"
    attention: str = "self_attn"
    linears: tuple[str, ...] = (*ATTENTION, *GATED_MLP)
    value: str = "self_attn.v_proj"
    value_rows: tuple[int, ...] | None = None
    eager_only: bool = False
    packable: bool = True
    transposed: bool = False
    head_first: str = "$^"
    """Matches the paths of norms that see (B, heads, T, F)."""


def _build(model: str, config: str, **overrides: object) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**{**SMALL, **overrides})
        built: PreTrainedModel = getattr(transformers, model)(settings)
        return _randomised(built)

    return build


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Gives norms and biases, which start at one and zero, values of their own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def _gemma3_multimodal() -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**SMALL, "head_dim": 8, **MIXED_WINDOWS}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    return _randomised(transformers.Gemma3ForConditionalGeneration(config))


# Head size 6: 4 query heads and 2 key/value heads give 24 + 12 + 12 rows.
CASES: dict[str, TinyCase] = {
    "llama": TinyCase(_build("LlamaForCausalLM", "LlamaConfig")),
    "llama_mha": TinyCase(
        _build("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4, attention_bias=True)
    ),
    "mistral": TinyCase(_build("MistralForCausalLM", "MistralConfig", sliding_window=5)),
    "qwen2": TinyCase(_build("Qwen2ForCausalLM", "Qwen2Config")),
    "qwen3": TinyCase(_build("Qwen3ForCausalLM", "Qwen3Config", head_dim=8)),
    "gemma2": TinyCase(
        _build(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **MIXED_WINDOWS,
        ),
        eager_only=True,
    ),
    "gemma3": TinyCase(
        _build("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, **MIXED_WINDOWS),
        head_first=r"[qk]_norm$",
    ),
    "gemma3_multimodal": TinyCase(
        _gemma3_multimodal, layer_prefix="model.language_model.layers", head_first=r"[qk]_norm$"
    ),
    "olmo2": TinyCase(_build("Olmo2ForCausalLM", "Olmo2Config")),
    "smollm3": TinyCase(_build("SmolLM3ForCausalLM", "SmolLM3Config")),
    "qwen3_5": TinyCase(
        _build(
            "Qwen3_5ForCausalLM",
            "Qwen3_5TextConfig",
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            layer_types=["full_attention", "linear_attention"] * 2,
        ),
        linears=(
            *(
                "linear_attn.in_proj_qkv",
                "linear_attn.in_proj_z",
                "linear_attn.in_proj_b",
                "linear_attn.in_proj_a",
            ),
            *("linear_attn.out_proj", *ATTENTION, *GATED_MLP),
        ),
        packable=False,
    ),
    "phi3": TinyCase(
        _build("Phi3ForCausalLM", "Phi3Config"),
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        value="self_attn.qkv_proj",
        value_rows=tuple(range(36, 48)),
    ),
    "gpt_neox": TinyCase(
        _build("GPTNeoXForCausalLM", "GPTNeoXConfig"),
        layer_prefix="gpt_neox.layers",
        attention="attention",
        linears=(
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        value="attention.query_key_value",
        value_rows=tuple(row for row in range(72) if row % 18 >= 12),
    ),
    "gpt2": TinyCase(
        _build("GPT2LMHeadModel", "GPT2Config", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        layer_prefix="transformer.h",
        attention="attn",
        linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        value="attn.c_attn",
        value_rows=tuple(range(48, 72)),
        transposed=True,
    ),
    "mixtral": TinyCase(
        _build("MixtralForCausalLM", "MixtralConfig", num_local_experts=3), linears=ATTENTION
    ),
    "qwen3_moe": TinyCase(
        _build(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            head_dim=8,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        linears=ATTENTION,
    ),
}

# Heads that two ranks, and four, do not divide, by number of query and key heads.
_SIX = {"num_attention_heads": 6, "head_dim": 4}
UNEVEN: dict[str, TinyCase] = {
    "llama, 3 and 1": TinyCase(
        _build("LlamaForCausalLM", "LlamaConfig", num_attention_heads=3, num_key_value_heads=1)
    ),
    "llama, 9 and 3": TinyCase(
        _build(
            "LlamaForCausalLM",
            "LlamaConfig",
            num_attention_heads=9,
            num_key_value_heads=3,
            hidden_size=36,
        )
    ),
    "gpt2, 3 and 3": TinyCase(
        _build(
            "GPT2LMHeadModel",
            "GPT2Config",
            num_attention_heads=3,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    ),
    "mistral, 6 and 2": TinyCase(
        _build("MistralForCausalLM", "MistralConfig", sliding_window=5, **_SIX)
    ),
    "gemma2, 6 and 2": TinyCase(
        _build(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            query_pre_attn_scalar=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **{**_SIX, **MIXED_WINDOWS},
        ),
        eager_only=True,
    ),
}


def save_published(name: str, folder: Path) -> PreTrainedModel:
    """Writes a tiny model as models of its class are published, and returns it: Qwen3.5's text
    model, whose files have a vision tower beside it, under its names there."""
    model = CASES[name].build()
    model.save_pretrained(folder)
    if name == "qwen3_5":
        file = folder / "model.safetensors"
        renamed = {
            key.replace("model.", "model.language_model.", 1): tensor
            for key, tensor in load_file(file).items()
        }
        save_file(renamed, file, {"format": "pt"})
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of letters, digits and a few signs, with a chat template, for `SMALL` models."""
    special = ["<pad>", "<s>", "</s>"]
    signs = "\u0120\u010a?!.,abcdefghijklmnopqrstuvwxyzHY0123456789"  # byte level: space, new line
    vocabulary = {token: index for index, token in enumerate([*special, *signs])}
    assert len(vocabulary) <= VOCABULARY
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)


# A plain one, one with transposed weights and fused values, and a recurrent one: enough to see
# within a minute that something broke.
QUICK = ("llama", "gpt2", "qwen3_5")


def by_architecture(names: Iterable[str] = CASES) -> list[Any]:
    """Parameters of a test over architectures; those that are not in `QUICK` are exhaustive."""
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in names
    ]


def tiny_llama() -> PreTrainedModel:
    """A 4-layer Llama with grouped-query attention, float32."""
    return CASES["llama"].build()


def scored_linears(
    case: TinyCase, model: PreTrainedModel, depth: int, suffix: str = ".weight"
) -> dict[str, int]:
    """Full names of the linears of the last `depth` layers, and their layer."""
    layers = model.config.get_text_config().num_hidden_layers
    names = dict(model.named_parameters())
    return {
        name: layer
        for layer in range(layers - depth, layers)
        for path in case.linears
        if (name := f"{case.layer_prefix}.{layer}.{path}{suffix}") in names
    }


def random_sequences(lengths: Sequence[tuple[int, int]], seed: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) pairs of (T,) each, from (prompt length, response length) pairs."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for prompt, response in lengths:
        ids = torch.randint(3, VOCABULARY, (prompt + response,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        sequences.append((ids, labels))
    return sequences


def tokenised(tokenizer: Any, file: str) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of every row: what follows the generation prompt, up to and including the end
    of the turn."""
    rows = []
    for line in Path(file).read_text().splitlines():
        fields = json.loads(line)
        user = [{"role": "user", "content": fields["prompt"]}]
        start = len(tokenizer.apply_chat_template(user, add_generation_prompt=True)["input_ids"])
        whole = [*user, {"role": "assistant", "content": fields["response"]}]
        ids = torch.tensor(tokenizer.apply_chat_template(whole)["input_ids"])
        labels = ids.clone()
        labels[:start] = -100
        labels[-1] = -100  # the line break behind the end of the turn
        rows.append((ids, labels))
    return rows


def collate(
    sequences: Sequence[tuple[Tensor, Tensor]], side: str = "right", pad: int = 0
) -> dict[str, Tensor]:
    """One padded batch of `input_ids`, `attention_mask`, `labels`."""
    length = max(len(ids) for ids, _ in sequences)
    batch = {
        "input_ids": torch.full((len(sequences), length), pad),
        "attention_mask": torch.zeros(len(sequences), length, dtype=torch.int64),
        "labels": torch.full((len(sequences), length), -100),
    }
    for row, (ids, labels) in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = labels
    return batch


def with_index(columns: Mapping[str, Tensor]) -> Batch:
    """A batch of some columns alone, with the response positions as `make_batch` adds them."""
    return cast(Batch, {**columns, "response_index": RowIndex.of_mask(columns["response"])})


def unpad(
    value_BT: Tensor, sequences: Sequence[tuple[Tensor, Tensor]], side: str = "right"
) -> list[Tensor]:
    """The rows of a (B, T) result, cut to their sequences."""
    length = value_BT.shape[1]
    return [
        row[: len(ids)] if side == "right" else row[length - len(ids) :]
        for row, (ids, _) in zip(value_BT, sequences, strict=True)
    ]


def pack(sequences: Sequence[tuple[Tensor, Tensor]], rows: int) -> dict[str, Tensor]:
    """The sequences laid into `rows` rows in turn, padded on the right; `document_ids` tell them
    apart."""
    parts = [sequences[row::rows] for row in range(rows)]
    joined = [
        (torch.cat([ids for ids, _ in part]), torch.cat([labels for _, labels in part]))
        for part in parts
    ]
    batch = collate(joined)
    batch["document_ids"] = torch.full_like(batch["input_ids"], -1)
    for row, part in enumerate(parts):
        ids = torch.cat(
            [torch.full((len(tokens),), number) for number, (tokens, _) in enumerate(part)]
        )
        batch["document_ids"][row, : len(ids)] = ids
    return batch


def unpack(value_BT: Tensor, sequences: Sequence[tuple[Tensor, Tensor]], rows: int) -> list[Tensor]:
    """The parts of a (B, T) result that belong to each sequence of `pack`."""
    offsets = [0] * rows
    parts = []
    for number, (ids, _) in enumerate(sequences):
        row = number % rows
        parts.append(value_BT[row, offsets[row] : offsets[row] + len(ids)])
        offsets[row] += len(ids)
    return parts
