"""Where a Hugging Face causal LM keeps its decoder layers, final norm, head and scored linears.

One `Architecture` per supported model class; `docs/architectures.md` says how to add one.
Everything else in the library speaks of a `Decoder`, which is one architecture applied to one
model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

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


@dataclass(frozen=True)
class ScoredLinear:
    """One linear of the scored set S."""

    path: str
    """Dotted path inside its decoder layer."""
    is_value: bool
    """Whether the causal path runs through it."""
    value_rows: Tensor | None = None
    """Which of its output rows are values; None is all."""
    feeds: str | None = None
    """Path of the linear that takes its output and nothing else: an adapter's B, for its A."""
    transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2 does."""
    name: str = ""
    """Full parameter name, for example `model.layers.27.self_attn.v_proj.weight`."""
    layer: int = -1
    """Index of its decoder layer."""


Stage = int | Literal["embeddings", "norm", "head"]
"""A part of a decoder that is run on its own: a layer by its index, what comes before the layers,
or after."""

ParameterSet = Literal["linears", "norms", "all"]


@dataclass(frozen=True)
class ScoredParameter:
    """One use of a parameter that values are computed for. Tied embeddings and head are two uses of
    one name."""

    name: str
    """Full parameter name."""
    stage: Stage
    path: str
    """Dotted path inside the stage's module."""
    kind: Literal["linear", "norm", "embedding", "other"]
    """What module owns it. Of `other` (experts, convolutions, ...) there is no gradient by
    position, so no Fisher."""


@dataclass(frozen=True)
class Decoder:
    """A model seen as body = embeddings + layers + norm, followed by a head."""

    model: PreTrainedModel
    architecture: Architecture

    @cached_property
    def config(self) -> PretrainedConfig:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def body(self) -> nn.Module:
        body: nn.Module = self.model.get_submodule(self.architecture.body)
        return body

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.body.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def norm(self) -> nn.Module:
        return self.body.get_submodule(self.architecture.norm)

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def logit_softcap(self) -> float | None:
        """Logits are `c tanh(logits / c)` where the model caps them."""
        return getattr(self.config, "final_logit_softcapping", None)

    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Runs the body on `input_ids` (B, T); returns (B, T, H) after the norm.

        `attention_mask` (B, T) may be absent, and had better be, when all padding is on the right:
        nothing real attends to what comes later, and kernels are faster without a mask.
        `position_ids` (B, T) that start anew tell packed documents apart.
        """
        hidden: Tensor = self.body(**body_inputs(batch)).last_hidden_state
        return hidden

    def stage(self, stage: Stage) -> nn.Module:
        """The module of a stage; that of the embeddings is the body, of which `stage_parameters`
        names a part."""
        named = {"embeddings": self.body, "norm": self.norm, "head": self.head}
        return self.layers[stage] if isinstance(stage, int) else named[stage]

    def stage_parameters(self, stage: Stage) -> dict[str, nn.Parameter]:
        """Parameters by their path inside the stage's module."""
        later = (
            (f"{self.architecture.layers}.", f"{self.architecture.norm}.")
            if stage == "embeddings"
            else ()
        )
        named = self.stage(stage).named_parameters()
        return {path: parameter for path, parameter in named if not path.startswith(later)}

    def scored_parameters(self, depth: int, chosen: ParameterSet) -> list[ScoredParameter]:
        """Every use of the chosen parameters of the last `depth` layers, in order of the forward
        pass.

        linears: `scored_linears`. norms: all normalisations of the layers, and the final one. all:
        every parameter of the layers, the final norm and the head; with all layers, the embeddings
        too. A head that is tied to embeddings is left out where those are, as a gradient of one use
        is not the parameter's. With adapters: theirs alone. Raises UserError for norms of a model
        with adapters, which are not trained.
        """
        if self.has_adapters and chosen == "norms":
            raise UserError(
                "valuation.parameters=norms, but LoRA trains no norms: use linears or all"
            )
        first = len(self.layers) - depth
        stages: list[Stage] = [*range(first, len(self.layers))]
        if chosen != "linears":
            stages.append("norm")
        if chosen == "all":
            stages.append("head")
            if first == 0:
                stages.insert(0, "embeddings")
        linears = {linear.name for linear in self.scored_linears(depth)}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        embeddings = {id(parameter) for parameter in self.stage_parameters("embeddings").values()}
        found = []
        for stage in stages:
            for path, parameter in self.stage_parameters(stage).items():
                name, owner = (
                    names[id(parameter)],
                    self.stage(stage).get_submodule(path.rpartition(".")[0]),
                )
                among = {"linears": name in linears, "norms": is_norm(owner), "all": True}[chosen]
                tied_alone = first > 0 and id(parameter) in embeddings
                if among and not tied_alone and (name in linears or not self.has_adapters):
                    found.append(ScoredParameter(name, stage, path, _kind_of(owner)))
        return found

    def freeze_unreached(self) -> None:
        """Freezes what text never runs through, such as a vision tower: without gradients it would
        only decay."""
        reached = {
            id(parameter) for part in (self.body, self.head) for parameter in part.parameters()
        }
        for parameter in self.model.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)

    def scored_linears(self, depth: int) -> list[ScoredLinear]:
        """The linears of the last `depth` layers, in order of the forward pass."""
        prefix = f"{self.architecture.body}.{self.architecture.layers}"
        first = len(self.layers) - depth
        return [
            replace(linear, name=f"{prefix}.{index}.{linear.path}.weight", layer=index)
            for index in range(first, len(self.layers))
            for linear in self._linears_of(self.layers[index])
        ]

    def stable_parameters(
        self, depth: int, chosen: ParameterSet, also: Container[str] = ()
    ) -> dict[str, nn.Parameter]:
        """By name, the scored parameters that have a Fisher: those whose gradient by position is
        known, and `also`."""
        return {
            scored.name: self.model.get_parameter(scored.name)
            for scored in self.scored_parameters(depth, chosen)
            if scored.kind != "other" or scored.name in also
        }

    def left_out(
        self, depth: int, chosen: ParameterSet, estimator: Literal["ghost", "exact"]
    ) -> list[str]:
        """What valuation does not see in the last `depth` layers, a sentence each."""
        first = len(self.layers) - depth
        paths = {
            index: dict(self.layers[index].named_modules())
            for index in range(first, len(self.layers))
        }
        notes = []
        unscored = [
            part
            for part in self.architecture.unscored
            if any(part in layer for layer in paths.values())
        ]
        if unscored and chosen != "all":
            notes.append(
                f"{' and '.join(unscored)} of the scored layers are trained but not scored"
            )
        no_attention = [
            index
            for index, layer in paths.items()
            if self.architecture.value_projection not in layer
        ]
        if no_attention and estimator == "ghost":
            layers = ", ".join(map(str, no_attention))
            notes.append(f"no causal term from layers without an attention matrix: {layers}")
        others = [
            scored.path
            for scored in self.scored_parameters(depth, chosen)
            if scored.kind == "other"
        ]
        if others:
            notes.append(
                f"no stability from {', '.join(sorted(set(others)))}, whose Fisher is not estimated"
            )
        if (
            chosen == "all"
            and first > 0
            and self.head.weight is self.model.get_input_embeddings().weight
        ):
            notes.append(
                "the head is tied to the embeddings, so both are scored with "
                "valuation.layers=all only"
            )
        return notes

    def _linears_of(self, layer: nn.Module) -> list[ScoredLinear]:
        """The scored linears of one layer; of a layer with LoRA adapters, the adapters."""
        modules = dict(layer.named_modules())
        known = self.architecture.linears
        for path, module in modules.items():
            scored = any(
                path == root or path.startswith(root + ".")
                for root in (*known, *self.architecture.unscored)
            )
            assert scored or not isinstance(module, nn.Linear | Conv1D), (
                f"{path} is missing from its architecture"
            )
        rows = (
            None
            if self.architecture.value_rows is None
            else self.architecture.value_rows(self.config)
        )
        found = []
        for path in known:
            is_value = path == self.architecture.value_projection
            value_rows = rows if is_value else None
            for adapter in getattr(modules.get(path), "lora_A", ()):
                up = f"{path}.lora_B.{adapter}"
                found.append(ScoredLinear(f"{path}.lora_A.{adapter}", is_value, feeds=up))
                found.append(ScoredLinear(up, is_value, value_rows))
            if path in modules and not self.has_adapters:
                found.append(
                    ScoredLinear(
                        path, is_value, value_rows, transposed=isinstance(modules[path], Conv1D)
                    )
                )
        return found

    @cached_property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters were injected (peft); then they are what is trained and scored."""
        return any(hasattr(module, "lora_A") for module in self.layers.modules())


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _kind_of(owner: nn.Module) -> Literal["linear", "norm", "embedding", "other"]:
    if isinstance(owner, nn.Linear | Conv1D):
        return "linear"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    gated = "Gated" in type(owner).__name__  # its gradient by position would need the gate too
    return "norm" if is_norm(owner) and not gated else "other"


def body_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a batch a model's body is called with."""
    keys = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    return {**{key: batch[key] for key in keys if key in batch}, "use_cache": False}


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Sees through a peft wrapper. Raises UserError for a model class without an architecture
    entry."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return Decoder(model, architecture_named(type(model).__name__))


def scored_depth(layers: int | str, num_layers: int) -> int:
    """Number of scored layers for `valuation.layers`. Raises UserError when the model has fewer."""
    if layers == "all":
        return num_layers
    assert isinstance(layers, int)
    if layers > num_layers:
        raise UserError(
            f"valuation.layers={layers}, but the model has only {num_layers} decoder layers; "
            f"use at most {num_layers}, or 'all'"
        )
    return layers


def architecture_named(model_class: str) -> Architecture:
    if model_class not in ARCHITECTURES:
        raise UserError(
            f"model class {model_class} has no entry in alphatoken/architectures.py, which must "
            "say where its layers, "
            "norm and linears are (docs/architectures.md shows how to add it); supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_class]
