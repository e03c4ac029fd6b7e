"""Plain copies of a decoder's layers, final norm and head, filled with the model's weights while they are needed.

They live outside the engine: no ZeRO hooks, no gradients on weights. With one layer at a time in memory they run the
decoder forward, backward (vector-Jacobian) and in forward mode (Jacobian-vector), under any ZeRO stage. Every rank must
ask for the same layers in the same order, whatever it then does with them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from alphatoken import collectives, zero3
from alphatoken.architectures import Decoder, decoder_of
from alphatoken.capture import BLOCKED_ATTENTION, CAPTURING_ATTENTION, AttentionCapture, AttentionConsumer, LayerInput


class LayerStreamer:
    """Layers `first` to the last, the norm and the head of a decoder.

    resident: keep them all, filled at every `refresh` (sharded weights are gathered, others shared with the model);
    otherwise each is filled when it is entered and emptied when it is left.
    """

    def __init__(self, decoder: Decoder, first: int, device: torch.device, resident: bool) -> None:
        self.indices = range(first, len(decoder.layers))
        self._device = device
        self._resident = resident
        self._attention: str = decoder.config._attn_implementation
        skeleton = _skeleton(decoder)
        self._layers = {index: (skeleton.layers[index], decoder.layers[index]) for index in self.indices}
        self._norm, self._head = (skeleton.norm, decoder.norm), (skeleton.head, decoder.head)

    def module(self, index: int) -> nn.Module:
        """The plain copy of a layer, filled or not."""
        return self._layers[index][0]

    def refresh(self) -> None:
        """Takes over the model's current weights, where they are kept. One all-gather per layer, norm and head."""
        if self._resident:
            for pair in (*self._layers.values(), self._norm, self._head):
                self._fill(*pair)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer, filled. Communicates one all-gather unless it is resident."""
        with self._filled(*self._layers[index]) as module:
            yield module

    @contextmanager
    def top(self) -> Iterator[tuple[nn.Module, nn.Linear]]:
        """Final norm and head, filled."""
        with self._filled(*self._norm) as norm, self._filled(*self._head) as head:
            assert isinstance(head, nn.Linear)
            yield norm, head

    def forward(
        self,
        module: nn.Module,
        hidden_BTH: Tensor,
        inputs: LayerInput,
        on_attention: AttentionConsumer | None = None,
    ) -> Tensor:
        """The output of a filled layer, (B, T, H); a graph is built where gradients are enabled and needed."""
        with AttentionCapture(self._attention, on_attention):
            return _output_of(module(hidden_BTH, *inputs.args, **inputs.kwargs))

    def vjp(
        self, module: nn.Module, hidden_BTH: Tensor, inputs: LayerInput, outgrad_BTH: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Vector-Jacobian product of a filled layer: gradients of <outgrad, output>.

        Returns the gradient at the input (B, T, H), and this rank's slices of the weights' gradients summed over all
        ranks (float32, by name inside the layer; one reduce-scatter).
        """
        with torch.enable_grad():
            entry = hidden_BTH.detach().requires_grad_()
            weights = {name: weight.detach().requires_grad_() for name, weight in module.named_parameters()}
            with AttentionCapture(self._attention):
                output = _output_of(functional_call(module, weights, (entry, *inputs.args), dict(inputs.kwargs)))
            gradients = torch.autograd.grad(output, [entry, *weights.values()], outgrad_BTH)
        slices = collectives.sum_to_slices([gradient.float() for gradient in gradients[1:]])
        return gradients[0], dict(zip(weights, slices, strict=True))

    def jvp(
        self,
        module: nn.Module,
        hidden_BTH: Tensor,
        tangent_BTH: Tensor,
        inputs: LayerInput,
        weight_tangents: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Jacobian-vector product of a filled layer: output and its derivative, (B, T, H) each.

        `tangent_BTH` is the direction of the input, `weight_tangents` (by name inside the layer, whole weights) those
        of weights; absent ones do not move. Attention runs in query blocks, the only kernel with a forward derivative.
        """
        with torch.no_grad(), forward_ad.dual_level(), AttentionCapture(BLOCKED_ATTENTION):
            hidden = forward_ad.make_dual(hidden_BTH, tangent_BTH)
            weights = {
                name: forward_ad.make_dual(weight.detach(), weight_tangents[name])
                if name in weight_tangents
                else weight
                for name, weight in module.named_parameters()
            }
            output = _output_of(functional_call(module, weights, (hidden, *inputs.args), dict(inputs.kwargs)))
            primal, tangent = forward_ad.unpack_dual(output)
            return primal, torch.zeros_like(primal) if tangent is None else tangent

    @contextmanager
    def _filled(self, module: nn.Module, source: nn.Module) -> Iterator[nn.Module]:
        if self._resident:
            yield module
            return
        self._fill(module, source)
        try:
            yield module
        finally:
            module.to("meta")

    def _fill(self, module: nn.Module, source: nn.Module) -> None:
        names, parameters = zip(*source.named_parameters(), strict=True)
        state = dict(zip(names, zero3.full_weights(parameters, self._device), strict=True))
        module.load_state_dict(state, strict=False, assign=True)
        for path, part in source.named_modules():
            module.get_submodule(path)._buffers.update(part._buffers)


def _skeleton(decoder: Decoder) -> Decoder:
    """The same model without storage, its attention routed through `AttentionCapture`."""
    config = copy.deepcopy(decoder.model.config)
    config.get_text_config()._attn_implementation = CAPTURING_ATTENTION
    with torch.device("meta"):
        model = type(decoder.model)(config)
        if decoder.has_adapters:
            from peft import inject_adapter_in_model

            for adapter, settings in decoder.model.peft_config.items():
                inject_adapter_in_model(settings, model, adapter)
    return decoder_of(model.requires_grad_(False).eval())


def _output_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
