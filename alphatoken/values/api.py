"""`score_tokens`: token values of a batch in one process, on any supported Hugging Face causal
LM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken.batch import IGNORE_INDEX, Batch, boundaries, loss_positions, make_batch
from alphatoken.config.choices import is_flash
from alphatoken.config.valuation import ValuationConfig
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
    contrast: Mapping[str, Tensor] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    config: ValuationConfig | None = None,
) -> TokenValues:
    """Values every response token of `batch` by the held-out examples `validation` (Eqs. 8-12 of
    arXiv 2606.01635, or with `ValuationConfig(estimator="exact")` the first-order effect of each).

    `batch` and `validation` hold `input_ids`, `attention_mask` and `labels`, (B, T) int64 each,
    labels -100 off the response; padding on either side. Packed rows also hold `document_ids` (a
    number per document) or `position_ids` that start anew with each document. `contrast`, likewise,
    is what `ValuationConfig(contrast=c)` with c > 0 needs and nothing else takes: training rows
    other than those of `batch`, whose mean gradient B is subtracted, so that a value is the effect
    on the held-out loss less c times that on the training loss; where its gradient comes from in a
    run (`contrast_from`) is not read. `fisher` and `reference` map full parameter names to tensors
    of the weight's shape; both or neither must be given, and without them the proxy terms are zero;
    so they are for parameters whose Fisher `recipes/fisher.py` does not estimate (experts, say)
    unless it is given. The model runs in eval mode and is left as it was. The terms are always
    computed separately, each (B, T) float32 at the position that predicts the token; `spread` is
    there with `ValuationConfig(reliability=True)`, where documents with an even and with an odd
    number are the halves. Raises UserError for an unsupported model, wrong shapes, a missing
    tensor, rows without response, an empty half, or `target="preference"`.
    """
    config = config or ValuationConfig()
    _check_contrast(config, contrast)
    config = config.model_copy(update={"split_terms": True, "contrast_from": "drawn"})
    decoder = decoder_of(model)
    device = next(model.parameters()).device
    depth = scored_depth(config.layers, len(decoder.layers))
    _check_batch("batch", batch)
    _check_steering(config, validation, contrast)
    if config.target == "preference":
        raise UserError(
            "valuation.target=preference compares held-out pairs, and score_tokens knows no pairs: "
            "leave it at sft, or use recipes/preference.py"
        )
    if (fisher is None) != (reference is None):
        given, missing = ("fisher", "reference") if reference is None else ("reference", "fisher")
        raise UserError(f"{given} is given without {missing}; stability needs both")
    if fisher is not None and model.dtype == torch.float16:
        raise UserError(
            "the model is in float16, in which the drift F (W - W_ref) is too small to be told "
            "from zero: load it in bfloat16 or float32, or leave out fisher and reference"
        )

    with evaluating(model), torch.no_grad():
        drift = None
        if fisher is not None and reference is not None:
            stable = decoder.stable_parameters(depth, config.parameters, also=fisher)
            drift = Drift(stable, fisher, reference, device)
        scorer = build_scorer(decoder, config, device, drift)
        scored_tokens = int(loss_positions(batch["labels"])[0].sum())
        held_out = list(_row_groups(decoder, validation, config, device))
        others = None
        if contrast is not None:
            others = list(_row_groups(decoder, contrast, config, device))
        scorer.refresh(held_out, scored_tokens, others)
        scored, responses = [], []
        for group in _row_groups(decoder, batch, config, device):
            with scorer.capture() as capture:
                decoder.hidden_states(group)
            scored.append(dict(scorer.score(capture.entry, group).values.items()))
            responses.append(group["response"])
    columns = {name: torch.cat([values[name] for values in scored]) for name in scored[0]}
    terms, spread_BT = {name: columns[name] for name in TERMS}, columns.get("spread")
    if config.balance == "std":
        response_BT = torch.cat(responses)
        parts = [
            TokenValues.from_terms(terms, weights, contrast=config.contrast).composite
            for weights in ((1.0, 0.0), (0.0, 1.0))
        ]
        scorer.scales.observe(
            [float(part_BT[response_BT].double().std(correction=0)) for part_BT in parts]
        )
    return TokenValues.from_terms(
        terms, scorer.part_weights, contrast=config.contrast, spread=spread_BT
    )


def _check_contrast(config: ValuationConfig, contrast: Mapping[str, Tensor] | None) -> None:
    if config.contrast > 0 and contrast is None:
        raise UserError(
            f"ValuationConfig(contrast={config.contrast}) needs `contrast`: training rows other "
            "than those that are scored, like `validation`"
        )
    if config.contrast == 0 and contrast is not None:
        raise UserError(
            "`contrast` rows are given, but ValuationConfig(contrast=0) subtracts nothing: set "
            "contrast=1.0, or leave the rows out"
        )


def _check_steering(
    config: ValuationConfig,
    validation: Mapping[str, Tensor],
    contrast: Mapping[str, Tensor] | None,
) -> None:
    for name, rows in {"validation": validation, "contrast": contrast}.items():
        if rows is not None:
            _check_batch(name, rows)
            _check_response(name, rows)
            if config.reliability:
                _check_halves(name, rows)


def _check_response(name: str, rows: Mapping[str, Tensor]) -> None:
    if not bool(loss_positions(rows["labels"])[0].any()):
        raise UserError(
            f"{name} has no response token: every label is -100 (position 0 predicts token 1)"
        )


def _check_halves(name: str, rows: Mapping[str, Tensor]) -> None:
    sign_BT = _half_signs(rows["attention_mask"], _documents(rows))
    response_BT, _ = loss_positions(rows["labels"])
    if len(sign_BT[response_BT].unique()) < 2:
        raise UserError(
            f"ValuationConfig(reliability=True) compares two halves of `{name}`, documents with "
            "an even and with an odd number, but only one of them has response tokens: give more "
            "rows, or set reliability=False"
        )


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
    decoder: Decoder, batch: Mapping[str, Tensor], config: ValuationConfig, device: torch.device
) -> Iterator[Batch]:
    """Cuts a caller's batch into micro-batches of at most `config.chunk_tokens` tokens (whole rows,
    at least one)."""
    batch = {key: value.to(device) for key, value in batch.items()}
    mask = batch["attention_mask"]
    rows = max(1, config.chunk_tokens // mask.shape[1])
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    documents = _documents(batch)
    if config.reliability:
        inputs["half_sign"] = _half_signs(mask, documents)
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
        if is_flash(decoder.config._attn_implementation):
            yield from _single_rows(inputs, starts)
            return
    elif bool(
        (mask[:, 1:] > mask[:, :-1]).any()
    ):  # padding on the left; on the right no mask is needed
        inputs["attention_mask"] = mask
        inputs["position_ids"] = batch.get("position_ids", (mask.cumsum(1) - 1).clamp_min(0))
    for start in range(0, mask.shape[0], rows):
        yield make_batch({key: value[start : start + rows] for key, value in inputs.items()})


def _single_rows(inputs: Mapping[str, Tensor], starts_BT: Tensor) -> Iterator[Batch]:
    """Micro-batches of one packed row each, with the boundaries that flash attention takes."""
    length = starts_BT.shape[1]
    for row, starts_T in enumerate(starts_BT.cpu()):
        bounds = [*starts_T.nonzero()[:, 0].tolist(), length]
        lengths = [end - start for start, end in pairwise(bounds)]
        cu_seq_lens, max_length = boundaries(lengths)
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        device_bounds = cu_seq_lens.to(starts_BT.device)
        yield make_batch({**own, "cu_seq_lens": device_bounds, "max_length": max_length})


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


def _half_signs(mask_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """1 on documents with an even number, -1 on odd ones, 0 on padding: (B, T) float32. Documents
    are counted row by row; without `documents_BT` a row is one."""
    starts_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    if documents_BT is not None:
        starts_BT[:, 1:] = documents_BT.diff(dim=1) != 0
        starts_BT &= mask_BT.bool()  # a stretch of padding is no document
    number_BT = starts_BT.flatten().cumsum(0).view(starts_BT.shape) - 1
    return torch.where(mask_BT.bool(), 1.0 - 2.0 * (number_BT % 2), 0.0)


def _since(starts: Tensor) -> Tensor:
    """Positions counted from the last start in each row."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - torch.cummax(torch.where(starts, index, 0), dim=1).values
