"""What a causal LM says next, in batches and on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from alphatoken.batch import Batch
from alphatoken.distributed import collectives


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    stop_tokens: list[int],
    pad_token: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[Tensor]:
    """The likeliest continuation of each prompt, (P,) each, token by token: (N,) each, at most
    `max_new_tokens`, the token that stops it included. `processors` may change what is likely.

    The model generates with a key-value cache, in one batch that is padded on the left. Under
    ZeRO-3 its hooks gather the layers one after the other for every token, and every rank goes on
    until all are done, so every rank must call it.
    """
    left_BP = pad_sequence(
        list(prompts), batch_first=True, padding_value=pad_token, padding_side="left"
    )
    inside = [torch.ones_like(prompt) for prompt in prompts]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_tokens,
        pad_token_id=pad_token,
    )
    with _without_own_settings(model):
        generated: Tensor = model.generate(
            left_BP,
            attention_mask=pad_sequence(inside, batch_first=True, padding_side="left"),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=collectives.world_size() > 1,
        )
    completion_BN = generated[:, left_BP.shape[1] :]
    stops_BN = torch.isin(completion_BN, torch.tensor(stop_tokens, device=completion_BN.device))
    before_stop_BN = stops_BN.cumsum(1) - stops_BN.long() == 0  # the stop itself included
    return [row[real] for row, real in zip(completion_BN, before_stop_BN, strict=True)]


def prompts_of(batch: Batch) -> list[Tensor]:
    """The prompts of a micro-batch without its padding, (P,) each; of a placeholder, which has to
    generate along with the others, its padding token."""
    if not len(batch["rows"]):
        return list(batch["input_ids"])
    return [
        ids_T[document_T >= 0]
        for ids_T, document_T in zip(batch["input_ids"], batch["document_ids"], strict=True)
    ]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills gaps from the model's own generation config, whose repetition penalty would
    change what is likely."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
