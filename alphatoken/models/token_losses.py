"""Token losses of a causal LM without training it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import HeadLoss

WEIGHTS = "lm."  # how the names of the model's weights begin in `ValuedModel`


class TokenLosses(nn.Module):
    """A causal LM whose forward pass returns the loss of each response token, as `losses_of`: a
    reference model."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.lm = decoder.model
        self.head_loss = HeadLoss(decoder.head, decoder.logit_softcap)
        self._decoder = decoder

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        return losses_of(self._decoder.hidden_states(batch), self.head_loss, batch)


@torch.no_grad()
def losses_of(hidden_BTH: Tensor, head_loss: HeadLoss, batch: Batch) -> Tensor:
    """Losses of a batch's response tokens, (B, T) float32, zero off the response, from what enters
    the head, (B, T, H)."""
    index = batch["response_index"]
    return index.put(head_loss(index.take(hidden_BTH), index.take(batch["targets"])))
