"""Plain copies of a decoder's layers, final norm, head and embeddings, filled with weights while
they are needed.

They live outside the engine: no ZeRO hooks, no gradients on weights. With one segment at a time in
memory they run the decoder forward, backward (vector-Jacobian) and in forward mode
(Jacobian-vector), under any ZeRO stage. Every rank must ask for the same segments in the same
order, whatever it then does with them.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from alphatoken.distributed import zero3
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder, body_inputs, decoder_of
from alphatoken.models.scored import Segment
from alphatoken.passes.attention_capture import (
    CAPTURING_ATTENTION,
    AttentionCapture,
    AttentionConsumer,
)
from alphatoken.passes.capture import LayerInput
from alphatoken.passes.divided_attention import kernel_of

NO_INPUT = LayerInput((), {})


class LayerStreamer:
    """Layers `first` to the last, the norm, the head and the embeddings of a decoder.

    resident: keep all but the embeddings, filled at every `refresh` (sharded weights are gathered,
    others shared with the model); otherwise each is filled when it is entered and emptied when it
    is left. forward_mode: experts run one after the other, as their grouped kernel has no forward
    derivative.
    """

    def __init__(
        self,
        decoder: Decoder,
        first: int,
        device: torch.device,
        *,
        resident: bool,
        forward_mode: bool = False,
    ) -> None:
        self.indices = range(first, len(decoder.layers))
        self._decoder = decoder
        self._device = device
        self._resident = resident
        self._attention = kernel_of(decoder.config._attn_implementation)
        skeleton = _skeleton(decoder)
        if forward_mode:
            skeleton.model.set_experts_implementation("eager")
        self._modules: dict[Segment, nn.Module] = {
            index: skeleton.layers[index] for index in self.indices
        }
        self._modules |= {"norm": skeleton.norm, "head": skeleton.head}
        # Without layers and norm, the body computes what enters the first layer.
        skeleton.body.set_submodule(decoder.architecture.layers, nn.ModuleList())
        skeleton.body.set_submodule(decoder.architecture.norm, nn.Identity())
        self._modules["embeddings"] = skeleton.body

    def module(self, segment: Segment) -> nn.Module:
        """The plain copy of a segment, filled or not."""
        return self._modules[segment]

    def refresh(self) -> None:
        """Takes over the model's current weights, where they are kept. One all-gather per layer,
        norm and head."""
        if self._resident:
            for segment in self._modules:
                if segment != "embeddings":
                    self._fill(segment)

    @contextmanager
    def segment(self, segment: Segment) -> Iterator[nn.Module]:
        """One segment, filled. Communicates one all-gather unless it is resident."""
        module = self._modules[segment]
        if self._resident and segment != "embeddings":
            yield module
            return
        self._fill(segment)
        try:
            yield module
        finally:
            module.to("meta")

    @contextmanager
    def top(self) -> Iterator[tuple[nn.Module, nn.Linear]]:
        """Final norm and head, filled."""
        with self.segment("norm") as norm, self.segment("head") as head:
            assert isinstance(head, nn.Linear)
            yield norm, head

    def embed(self, weights: Mapping[str, Tensor], batch: Mapping[str, object]) -> Tensor:
        """What enters the first layer, (B, T, H), with `weights` (whole, all of the segment, by
        path); linear in them.

        Their tangents in place of the weights therefore give the derivative, and gradients depend
        on no weight.
        """
        self._take_buffers("embeddings")
        hidden: Tensor = functional_call(
            self._modules["embeddings"], dict(weights), (), body_inputs(batch)
        )[0]
        return hidden

    def forward(
        self,
        module: nn.Module,
        hidden_BTH: Tensor,
        inputs: LayerInput,
        on_attention: AttentionConsumer | None = None,
    ) -> Tensor:
        """The output of a filled layer, (B, T, H); a graph is built where gradients are enabled and
        needed."""
        with AttentionCapture(self._attention, on_attention), zero3.plain_linears():
            return _output_of(module(hidden_BTH, *inputs.args, **inputs.kwargs))

    def vjp(
        self,
        module: nn.Module,
        hidden_BTH: Tensor,
        inputs: LayerInput,
        outgrad_BTH: Tensor,
        paths: Collection[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Vector-Jacobian product of a filled layer or norm: gradients of <outgrad, output>.

        Returns the gradient at the input (B, T, H), and those of the parameters named by `paths`.
        """
        with torch.enable_grad():
            entry = hidden_BTH.detach().requires_grad_()
            weights = {path: module.get_parameter(path).detach().requires_grad_() for path in paths}
            with AttentionCapture(self._attention), zero3.plain_linears():
                output = _output_of(
                    functional_call(module, weights, (entry, *inputs.args), dict(inputs.kwargs))
                )
            gradients = torch.autograd.grad(
                output, [entry, *weights.values()], outgrad_BTH, allow_unused=True
            )
        return gradients[0], {
            path: torch.zeros_like(weights[path]) if gradient is None else gradient
            for path, gradient in zip(weights, gradients[1:], strict=True)
        }

    def jvp(
        self,
        module: nn.Module,
        hidden: Tensor,
        tangents: Tensor,
        inputs: LayerInput,
        weight_tangents: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Jacobian-vector products of a filled layer or norm in N directions at once: the output,
        of the input's shape (..., H), and its derivatives, (N, ..., H). What does not move is
        computed once.

        `tangents`, (N, ..., H), are the directions of the input, `weight_tangents` (by path inside
        the module; N whole weights, stacked) those of weights; absent ones do not move. Attention
        runs in query blocks, the only kernel with a forward derivative, and torch's own functions
        in place of fused ones. Raises UserError where a layer has an operation without one.
        """
        weights = {path: module.get_parameter(path).detach() for path in weight_tangents}

        def output(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
            arguments = (hidden, *inputs.args)
            return _output_of(functional_call(module, weights, arguments, dict(inputs.kwargs)))

        def along(tangent: Tensor, moves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            # Strict: a tangent that is lost would otherwise be a zero, and pass for a value.
            primal, derivative = jvp(output, (hidden, weights), (tangent, moves), strict=True)[:2]
            return primal, derivative

        attention = AttentionCapture(self._attention, blocked=True)
        plain = _torch_functions(module)
        with torch.no_grad(), attention, plain, zero3.plain_linears():
            try:
                primal, derivatives = vmap(along, out_dims=(None, 0))(  # type: ignore[arg-type]
                    tangents, dict(weight_tangents)
                )
            except RuntimeError as error:
                lacking = _lacking(str(error))
                if lacking is None:
                    raise
                raise self._underivable(module, lacking) from None
        return primal, derivatives

    def _underivable(self, module: nn.Module, lacking: str) -> UserError:
        return UserError(
            "valuation.estimator=exact is not possible with "
            f"{type(self._decoder.model).__name__} here: a {type(module).__name__} has no "
            f"forward derivative ({lacking}); use valuation.estimator=ghost"
        )

    def _fill(self, segment: Segment) -> None:
        module = self._modules[segment]
        paths, parameters = zip(*self._decoder.segment_parameters(segment).items(), strict=True)
        state = dict(zip(paths, zero3.full_weights(parameters, self._device), strict=True))
        module.load_state_dict(state, strict=False, assign=True)
        self._take_buffers(segment)

    def _take_buffers(self, segment: Segment) -> None:
        source = self._decoder.segment(segment)
        for path, part in self._modules[segment].named_modules():
            part._buffers.update(source.get_submodule(path)._buffers)


def _skeleton(decoder: Decoder) -> Decoder:
    """A copy of the model without storage, its attention routed through `AttentionCapture`."""
    config = copy.deepcopy(decoder.model.config)
    config.get_text_config()._attn_implementation = CAPTURING_ATTENTION
    with torch.device("meta"):
        model = type(decoder.model)(config)
        if decoder.has_adapters:
            from peft import inject_adapter_in_model

            for adapter, settings in decoder.model.peft_config.items():
                inject_adapter_in_model(settings, model, adapter)
    return decoder_of(model.requires_grad_(requires_grad=False).eval())


@contextmanager
def _torch_functions(module: nn.Module) -> Iterator[None]:
    """While it lasts, modelling files of a layer's parts call the torch version of each function
    for which `transformers` takes a fused one where its package is installed: linear attention and
    its convolution have no forward derivative there."""
    replaced: list[tuple[ModuleType, str, object]] = []
    files = {type(part).__module__ for part in module.modules()}
    try:
        for file in [sys.modules[name] for name in files]:
            for name, function in list(vars(file).items()):
                code = getattr(function, "__code__", None)
                if code is not None and "torch_function" in code.co_freevars:
                    setattr(file, name, inspect.unwrap(function))
                    replaced.append((file, name, function))
        yield
    finally:
        for file, name, function in replaced:
            setattr(file, name, function)


LACKING = {
    "independent of": "an operation in it loses the tangent",
    "data pointer": "a kernel in it reads raw memory",
    "setup_context": "an autograd.Function in it has no setup_context",
    "forward AD|forward-mode|jvp|vmap|[Bb]atching rule": None,
}
"""What is missing for a forward derivative, by what torch says of it; None: its own words do."""


def _lacking(error: str) -> str | None:
    """What an error says is missing for a forward derivative; None where it is about another
    thing."""
    for pattern, words in LACKING.items():
        if re.search(pattern, error):
            return words or error.partition(" that does not")[0]
    return None


def _output_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
