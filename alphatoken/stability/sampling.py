"""What the reference model itself would answer: tokens sampled at temperature 1, for the
Monte-Carlo Fisher.

All randomness comes in as uniform numbers, one per token, so that samples depend neither on ranks
nor on batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from alphatoken.batch import IGNORE_INDEX, Batch, make_batch
from alphatoken.models.decoder import Decoder
from alphatoken.models.generation import continuations
from alphatoken.models.head import draw_tokens, head_samples


def teacher_forced(
    batch: Batch,
    hidden_BTH: Tensor,
    head: nn.Linear,
    uniform_BT: Tensor,
    softcap: float | None,
) -> Batch:
    """Replaces each response token's label by one drawn from the model's prediction there; the
    inputs stay.

    `hidden_BTH`: states after the final norm, of a pass over the given responses.
    """
    response_BT = batch["response"]
    sampled_BT = batch["targets"].clone()
    sampled_BT[response_BT] = head_samples(
        hidden_BTH[response_BT], head, uniform_BT[response_BT], softcap
    )
    labels_BT = nn.functional.pad(sampled_BT[:, :-1], (1, 0), value=IGNORE_INDEX)
    return make_batch({"input_ids": batch["input_ids"], "labels": labels_BT})


def rollouts(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    uniform_BN: Tensor,
    stop_tokens: list[int],
    pad_token: int,
) -> Batch:
    """Continues the prompts, (P,) each, by at most N tokens sampled from the model.

    Padding is on the right. Labels are -100 on prompts; the token that stops a completion has one.
    Every rank must call it.
    """
    width = max(len(prompt) for prompt in prompts)
    completions = continuations(
        decoder.model,
        prompts,
        max_new_tokens=uniform_BN.shape[1],
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        processors=[_Draws(uniform_BN, width)],
    )
    ids = [torch.cat(parts) for parts in zip(prompts, completions, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, IGNORE_INDEX), completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return make_batch(
        {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
    )


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the drawn token possible; `generate` then takes it as the likeliest."""

    def __init__(self, uniform_BN: Tensor, prompt_width: int) -> None:
        self._uniform_BN = uniform_BN
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B = draw_tokens(scores, self._uniform_BN[:, input_ids.shape[1] - self._prompt_width])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
