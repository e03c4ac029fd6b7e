"""`score_tokens`: token values of a batch in one process, on any supported Hugging Face causal
LM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken.batch import IGNORE_INDEX, Batch, loss_positions, make_batch
from alphatoken.config.sections import ValuationConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder, decoder_of, evaluating
from alphatoken.models.scored import scored_depth
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import TERMS, TokenValues
from alphatoken.values.registry import build_scorer


def score_tokens(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    *,
    fisher: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    config: ValuationConfig | None = None,
) -> TokenValues:
    """Values every response token of `batch` by the held-out examples `validation` (Eqs. 8-12 of
    arXiv 2606.01635, or with `estimator="exact"` the first-order effect of each).

    `batch` and `validation` hold `input_ids`, `attention_mask` and `labels`, (B, T) int64 each,
    labels -100 off the response; padding on either side. Packed rows also hold `document_ids` (a
    number per document) or `position_ids` that start anew with each document. `fisher` and
    `reference` map full parameter names to tensors of the weight's shape; both or neither must be
    given, and without them the proxy terms are zero; so they are for parameters whose Fisher
    `recipes/fisher.py` does not estimate (experts, say) unless it is given. The model runs in eval
    mode and is left as it was. The four terms are always computed separately, each (B, T) float32
    at the position that predicts the token. Raises UserError for an unsupported model, wrong
    shapes, a missing tensor, or a validation batch without response.
    """
    config = (config or ValuationConfig()).model_copy(update={"split_terms": True})
    decoder = decoder_of(model)
    device = next(model.parameters()).device
    depth = scored_depth(config.layers, len(decoder.layers))
    _check_batch("batch", batch)
    _check_batch("validation", validation)
    if not bool(loss_positions(validation["labels"])[0].any()):
        raise UserError(
            "validation has no response token: every label is -100 (position 0 predicts token 1)"
        )
    if (fisher is None) != (reference is None):
        given, missing = ("fisher", "reference") if reference is None else ("reference", "fisher")
        raise UserError(f"{given} is given without {missing}; stability needs both")

    with evaluating(model), torch.no_grad():
        drift = None
        if fisher is not None and reference is not None:
            stable = decoder.stable_parameters(depth, config.parameters, also=fisher)
            drift = Drift(stable, fisher, reference, device)
        scorer = build_scorer(decoder, config, device, drift)
        held_out = list(_row_groups(decoder, validation, config.chunk_tokens, device))
        scorer.refresh(held_out, scored_tokens=int(loss_positions(batch["labels"])[0].sum()))
        scored, responses = [], []
        for rows in _row_groups(decoder, batch, config.chunk_tokens, device):
            with scorer.capture() as capture:
                decoder.hidden_states(rows)
            scored.append(scorer.score(capture.entry, rows).values)
            responses.append(rows["response"])
    terms = [torch.cat([getattr(values, name) for values in scored]) for name in TERMS]
    if config.balance == "std":
        response_BT = torch.cat(responses)
        parts = terms[0] + terms[1], terms[2] + terms[3]
        scorer.scales.observe(
            [float(part_BT[response_BT].double().std(correction=0)) for part_BT in parts]
        )
    return TokenValues.from_terms(terms, scorer.part_weights)


def _check_batch(name: str, batch: Mapping[str, Tensor]) -> None:
    shapes = {}
    for key in ("input_ids", "attention_mask", "labels"):
        if key not in batch:
            raise UserError(
                f"{name} has no {key!r}; it needs input_ids, attention_mask and labels, (B, T) "
                "int64 each"
            )
    for key in ("input_ids", "attention_mask", "labels", "position_ids", "document_ids"):
        if key in batch:
            shapes[key] = tuple(batch[key].shape)
    if len(set(shapes.values())) != 1 or len(shapes["labels"]) != 2:
        raise UserError(f"{name}: all tensors must have one shape (B, T), but they have {shapes}")


def _row_groups(
    decoder: Decoder, batch: Mapping[str, Tensor], chunk_tokens: int, device: torch.device
) -> Iterator[Batch]:
    """Cuts a caller's batch into micro-batches of at most `chunk_tokens` tokens (whole rows, at
    least one)."""
    batch = {key: value.to(device) for key, value in batch.items()}
    mask = batch["attention_mask"]
    rows = max(1, chunk_tokens // mask.shape[1])
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    documents = _documents(batch)
    if documents is not None:
        if decoder.architecture.recurrent:
            raise UserError(
                f"{type(decoder.model).__name__} carries a state along the row: packed rows are "
                "not possible"
            )
        starts = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
        inputs["position_ids"] = _since(starts)
        inputs["labels"] = batch["labels"].masked_fill(
            starts, IGNORE_INDEX
        )  # nothing predicts a document's first token
        if "flash" in decoder.config._attn_implementation:
            rows = 1  # its kernels tell documents apart in single rows only
    elif bool(
        (mask[:, 1:] > mask[:, :-1]).any()
    ):  # padding on the left; on the right no mask is needed
        inputs["attention_mask"] = mask
        inputs["position_ids"] = batch.get("position_ids", (mask.cumsum(1) - 1).clamp_min(0))
    for start in range(0, mask.shape[0], rows):
        yield make_batch({key: value[start : start + rows] for key, value in inputs.items()})


def _documents(batch: Mapping[str, Tensor]) -> Tensor | None:
    """A number per document, (B, T), different for neighbours and for padding; None where rows are
    not packed."""
    mask = batch["attention_mask"]
    if "document_ids" in batch:
        documents = batch["document_ids"]
    elif "position_ids" in batch:
        positions = batch["position_ids"]
        starts = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1) & mask.bool()
        starts[:, 1:] &= mask[:, :-1].bool()
        if not bool(starts[:, 1:].any()):
            return None
        documents = starts.cumsum(1)
    else:
        return None
    return torch.where(mask.bool(), documents, documents.min() - 1)


def _since(starts: Tensor) -> Tensor:
    """Positions counted from the last start in each row."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - torch.cummax(torch.where(starts, index, 0), dim=1).values
