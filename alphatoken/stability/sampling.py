"""What the reference model itself would answer: tokens sampled at temperature 1, for the
Monte-Carlo Fisher.

All randomness comes in as uniform numbers, one per token, so that samples depend neither on ranks
nor on batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from alphatoken.batch import IGNORE_INDEX, Batch, make_batch
from alphatoken.distributed import collectives
from alphatoken.models.decoder import Decoder
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


@torch.no_grad()
def rollouts(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    uniform_BN: Tensor,
    stop_tokens: list[int],
    pad_token: int,
) -> Batch:
    """Continues the prompts, (P,) each, by at most N tokens sampled from the model.

    Padding is on the right. Labels are -100 on prompts; the token that stops a completion has one.
    The model generates with a key-value cache, in batches. Under ZeRO-3 its hooks gather the layers
    one after the other for every token, and every rank goes on until all are done, so every rank
    must call it.
    """
    left_BP = pad_sequence(
        list(prompts), batch_first=True, padding_value=pad_token, padding_side="left"
    )
    inside = [torch.ones_like(prompt) for prompt in prompts]
    settings = GenerationConfig(
        max_new_tokens=uniform_BN.shape[1],
        do_sample=False,
        eos_token_id=stop_tokens,
        pad_token_id=pad_token,
    )
    with _without_own_settings(decoder.model):
        generated: Tensor = decoder.model.generate(
            left_BP,
            attention_mask=pad_sequence(inside, batch_first=True, padding_side="left"),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Draws(uniform_BN, left_BP.shape[1])]),
            synced_gpus=collectives.world_size() > 1,
        )
    completion_BN = generated[:, left_BP.shape[1] :]
    stops_BN = torch.isin(completion_BN, torch.tensor(stop_tokens, device=completion_BN.device))
    before_stop_BN = stops_BN.cumsum(1) - stops_BN.long() == 0  # the stop itself included
    completions = [row[real] for row, real in zip(completion_BN, before_stop_BN, strict=True)]
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


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills gaps from the model's own generation config, whose repetition penalty would
    bias the draws."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the drawn token possible; `generate` then takes it as the likeliest."""

    def __init__(self, uniform_BN: Tensor, prompt_width: int) -> None:
        self._uniform_BN = uniform_BN
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B = draw_tokens(scores, self._uniform_BN[:, input_ids.shape[1] - self._prompt_width])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
