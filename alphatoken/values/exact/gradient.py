"""The full gradient of some rows' mean loss, such as G = grad(sum of held-out response losses) /
N_val, computed outside of the engine.

The model runs forward under whatever hooks it has; then one segment after the other, from the last,
is filled, run again and differentiated, its weight gradients summed over the ranks and cut into
slices. Prompt positions count too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from alphatoken.batch import Batch
from alphatoken.distributed import collectives, zero3
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import head_nll
from alphatoken.models.scored import ScoredParameter, Segment
from alphatoken.objectives.base import ResponseLosses
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.values.estimator import (
    BodyPass,
    Coefficients,
    Eligible,
    count_eligible,
    of_eligible,
)


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in a sum: its coefficient, 1 without any, times the sign of its half
    where that is asked for."""

    coefficients: Coefficients | None
    signed: bool

    def of(self, losses: ResponseLosses) -> Tensor:
        """The weights of a batch's losses, (B, T)."""
        weight_BT = torch.ones_like(losses.nll_BT)
        if self.coefficients is not None:
            weight_BT = self.coefficients(losses)
        return weight_BT * losses.batch["half_sign"] if self.signed else weight_BT


class MeanGradient:
    """Keeps this rank's slices of the mean gradient of some rows' response losses, float32, by
    parameter name; with `signed` also those of 1/N grad(sum of s_v l_v), where s_v is 1 in one half
    of the rows and -1 in the other. Every rank must call `refresh` and `own` alike."""

    def __init__(
        self,
        decoder: Decoder,
        scored: Sequence[ScoredParameter],
        streamer: LayerStreamer,
        device: torch.device,
        *,
        signed: bool = False,
    ) -> None:
        self._signed = signed
        self._decoder = decoder
        self._scored = scored
        self._streamer = streamer
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._signed_sums: dict[str, Tensor] = {}
        self._count = 1

    def own(self, name: str, *, signed: bool = False) -> Tensor:
        """This rank's slice of the named parameter's gradient, or signed gradient, flat and padded
        like `zero3.master_slice`."""
        return (self._signed_sums if signed else self._sums)[name] / self._count

    def free(self) -> None:
        """Drops all slices, until the next `refresh`."""
        self._sums, self._signed_sums = {}, {}

    @torch.no_grad()
    def refresh(
        self,
        batches: Sequence[Batch],
        run_body: BodyPass,
        coefficients: Coefficients | None = None,
        eligible: Eligible | None = None,
    ) -> list[Tensor]:
        """Takes in this rank's share of the sequences, as `Scorer.refresh` wants it; returns token
        losses. `run_body` runs the decoder's body; `coefficients` multiply the losses in the sums,
        if given; the mean is over all response tokens or the `eligible`.

        Memory besides the weights of one segment: the state between any two scored layers for all
        sequences, and one segment's gradients in float32. Communication per segment: one
        all-gather, one reduce-scatter; with signed gradients twice that, and another pass back.
        """
        if eligible is not None:
            coefficients = of_eligible(eligible, coefficients)
        self._sums, self._signed_sums = {}, {}
        entries = []
        for batch in batches:
            with EntryCapture(self._decoder, self._streamer.indices.start, keep="every") as capture:
                run_body(batch)
            entries.append(capture.entry)
        losses = self._back(batches, entries, self._sums, signed=False, coefficients=coefficients)
        if self._signed:
            self._back(batches, entries, self._signed_sums, signed=True, coefficients=coefficients)
        if eligible is None:
            own = torch.tensor(sum(batch["response_index"].count for batch in batches))
        else:
            own = count_eligible(eligible, batches, losses)
        self._count = max(int(collectives.sum_over_ranks(own.to(self._device))), 1)
        return losses

    def _back(
        self,
        batches: Sequence[Batch],
        entries: Sequence[Entry],
        sums: dict[str, Tensor],
        *,
        signed: bool,
        coefficients: Coefficients | None,
    ) -> list[Tensor]:
        """Adds the gradients of the summed losses, each times its coefficient and, if `signed`, the
        sign of its half; returns the losses alone."""
        weights = LossWeights(coefficients=coefficients, signed=signed)
        losses, outgrads = self._top(batches, entries, sums, weights)
        for place, index in reversed(list(enumerate(self._streamer.indices))):
            outgrads = self._layer(index, place, entries, outgrads, sums)
        if self._paths("embeddings"):
            self._embeddings(batches, outgrads, sums)
        return losses

    def _layer(
        self,
        index: int,
        place: int,
        entries: Sequence[Entry],
        outgrads: Sequence[Tensor],
        sums: dict[str, Tensor],
    ) -> list[Tensor]:
        """Adds a layer's gradients; returns those at its input, (B, T, H) per batch."""
        paths, gradients, below = self._paths(index), self._zeros(index), []
        with self._streamer.segment(index) as module:
            for entry, outgrad_BTH in zip(entries, outgrads, strict=True):
                inputs = entry.layer_inputs[place]
                ingrad_BTH, found = self._streamer.vjp(
                    module, entry.into(place), inputs, outgrad_BTH, paths
                )
                below.append(ingrad_BTH)
                for path, gradient in found.items():
                    gradients[path] += gradient
        self._reduce(index, gradients, sums)
        return below

    def _top(
        self,
        batches: Sequence[Batch],
        entries: Sequence[Entry],
        sums: dict[str, Tensor],
        weights: LossWeights,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Token losses of each batch, and the gradient at the last layer's output, (B, T, H)."""
        losses, outgrads = [], []
        norm_gradients, head_gradients = self._zeros("norm"), self._zeros("head")
        with self._streamer.top() as (norm, head), torch.enable_grad():
            for batch, entry in zip(batches, entries, strict=True):
                index = batch["response_index"]
                hidden_RH = index.take(entry.out).requires_grad_()
                norm_weights = {
                    path: norm.get_parameter(path).detach().requires_grad_()
                    for path in norm_gradients
                }
                head_weights = {
                    path: head.get_parameter(path).detach().requires_grad_()
                    for path in head_gradients
                }
                normed_RH = functional_call(norm, norm_weights, (hidden_RH,))
                weight_VH, bias_V = (
                    head_weights.get("weight", head.weight),
                    head_weights.get("bias", head.bias),
                )
                targets_R = index.take(batch["targets"])
                nll_R = head_nll(
                    normed_RH, weight_VH, bias_V, targets_R, self._decoder.logit_softcap
                )
                nll_BT = index.put(nll_R.detach())
                losses.append(nll_BT)
                weight_R = index.take(weights.of(ResponseLosses(batch=batch, nll_BT=nll_BT)))
                leaves = [hidden_RH, *norm_weights.values(), *head_weights.values()]
                outgrad_RH, *found = torch.autograd.grad(nll_R, leaves, weight_R)
                for total, gradient in zip(
                    [*norm_gradients.values(), *head_gradients.values()], found, strict=True
                ):
                    total += gradient
                outgrads.append(index.put(outgrad_RH))
        self._reduce("norm", norm_gradients, sums)
        self._reduce("head", head_gradients, sums)
        return losses, outgrads

    def _embeddings(
        self, batches: Sequence[Batch], outgrads: Sequence[Tensor], sums: dict[str, Tensor]
    ) -> None:
        gradients = self._zeros("embeddings")
        # What is linear in its weights has the same gradient whatever they are, so they need
        # not be gathered: one zero stands for all of them.
        zero = torch.zeros((), device=self._device)
        weights = {
            path: zero.expand(each.shape).requires_grad_() for path, each in gradients.items()
        }
        for batch, outgrad_BTH in zip(batches, outgrads, strict=True):
            with torch.enable_grad():
                hidden_BTH = self._streamer.embed(weights, batch)
            # In float32, also of a bf16 model: some tokens come many times, and their gradients
            # are added one by one.
            found = torch.autograd.grad(
                hidden_BTH, list(weights.values()), outgrad_BTH.to(hidden_BTH.dtype)
            )
            for path, gradient in zip(weights, found, strict=True):
                gradients[path] += gradient
        self._reduce("embeddings", gradients, sums)

    def _paths(self, segment: Segment) -> dict[str, str]:
        """Names of a segment's scored parameters by path."""
        return {scored.path: scored.name for scored in self._scored if scored.segment == segment}

    def _zeros(self, segment: Segment) -> dict[str, Tensor]:
        shapes = {
            path: zero3.full_shape(self._decoder.segment_parameters(segment)[path])
            for path in self._paths(segment)
        }
        return {path: torch.zeros(shape, device=self._device) for path, shape in shapes.items()}

    def _reduce(
        self, segment: Segment, gradients: Mapping[str, Tensor], sums: dict[str, Tensor]
    ) -> None:
        """Adds a segment's gradients, of all ranks, to the slices; tied weights get theirs from two
        segments."""
        parameters = [self._decoder.segment_parameters(segment)[path] for path in gradients]
        names = self._paths(segment)
        for path, own in zip(
            gradients, zero3.sum_to_slices(list(gradients.values()), parameters), strict=True
        ):
            name = names[path]
            sums[name] = sums[name] + own if name in sums else own
