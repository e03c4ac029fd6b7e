"""A causal LM as body, layers, norm and head, and running it without its own loss."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alphatoken.batch import WholeRows
from alphatoken.errors import UserError
from alphatoken.models.architectures import Architecture, architecture_named
from alphatoken.models.scored import (
    ParameterSet,
    ScoredLinear,
    ScoredParameter,
    Segment,
    is_norm,
    kind_of,
)


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
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(self.model).__name__}: the head must be an nn.Linear, not "
                f"{type(head).__name__} (docs/architectures.md says what must hold for a class)"
            )
        return head

    @property
    def logit_softcap(self) -> float | None:
        """Logits are `c tanh(logits / c)` where the model caps them."""
        return getattr(self.config, "final_logit_softcapping", None)

    def hidden_states(self, batch: Mapping[str, object]) -> Tensor:
        """Runs the body on `input_ids` (B, T); returns (B, T, H) after the norm.

        `attention_mask` (B, T) may be absent, and had better be, when all padding is on the right:
        nothing real attends to what comes later, and kernels are faster without a mask.
        `position_ids` (B, T) that start anew tell packed documents apart.
        """
        hidden: Tensor = self.body(**body_inputs(batch)).last_hidden_state
        return hidden

    def segment(self, segment: Segment) -> nn.Module:
        """The module of a segment; that of the embeddings is the body, of which
        `segment_parameters` names a part."""
        named = {"embeddings": self.body, "norm": self.norm, "head": self.head}
        return self.layers[segment] if isinstance(segment, int) else named[segment]

    def segment_parameters(self, segment: Segment) -> dict[str, nn.Parameter]:
        """Parameters by their path inside the segment's module."""
        later = (
            (f"{self.architecture.layers}.", f"{self.architecture.norm}.")
            if segment == "embeddings"
            else ()
        )
        named = self.segment(segment).named_parameters()
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
        segments: list[Segment] = [*range(first, len(self.layers))]
        if chosen != "linears":
            segments.append("norm")
        if chosen == "all":
            segments.append("head")
            if first == 0:
                segments.insert(0, "embeddings")
        linears = {linear.name for linear in self.scored_linears(depth)}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        embeddings = {id(parameter) for parameter in self.segment_parameters("embeddings").values()}
        found = []
        for segment in segments:
            for path, parameter in self.segment_parameters(segment).items():
                name, owner = (
                    names[id(parameter)],
                    self.segment(segment).get_submodule(path.rpartition(".")[0]),
                )
                among = {"linears": name in linears, "norms": is_norm(owner), "all": True}[chosen]
                tied_alone = first > 0 and id(parameter) in embeddings
                if among and not tied_alone and (name in linears or not self.has_adapters):
                    found.append(ScoredParameter(name, segment, path, kind_of(owner)))
        return found

    def freeze_unreached(self) -> None:
        """Freezes what text never runs through, such as a vision tower: without gradients it would
        only decay."""
        reached = {
            id(parameter) for part in (self.body, self.head) for parameter in part.parameters()
        }
        for parameter in self.model.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(requires_grad=False)

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

    def left_out(self, depth: int, chosen: ParameterSet) -> list[str]:
        """What no estimator sees in the last `depth` layers, a sentence each."""
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
                "the head is tied to the embeddings, so both are scored with valuation.layers=all "
                "only"
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
            if not scored and isinstance(module, nn.Linear | Conv1D):
                raise UserError(
                    f"{type(self.model).__name__}: the architecture names neither as scored nor as "
                    f"unscored the linear {path} of a layer; add it to `linears` or `unscored` of "
                    "its entry (docs/architectures.md)"
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


def body_inputs(batch: Mapping[str, object]) -> dict[str, Any]:
    """Takes from a batch what a model's body is called with; boundaries of packed documents under
    the names that flash attention has for them, which no other kernel reads, and what attention has
    to know of rows that are divided over ranks."""
    keys = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    inputs: dict[str, Any] = {key: tensor for key, tensor in batch.items() if key in keys}
    if "cu_seq_lens" in batch:
        inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = batch["cu_seq_lens"]
        inputs["max_length_q"] = inputs["max_length_k"] = batch["max_length"]
    if "whole_rows" in batch:
        rows = batch["whole_rows"]
        assert isinstance(rows, WholeRows)
        inputs["whole_rows"] = rows.of_a_pass()
    return {**inputs, "use_cache": False}


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Sees through a peft wrapper. Raises UserError for a model class without an architecture
    entry."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return Decoder(model, architecture_named(type(model).__name__))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
