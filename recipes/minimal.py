"""The whole method in one file and one process: score, select, train. No engine, no configuration.

    python -m recipes.minimal --model models/smollm2 --train train.jsonl --validation held_out.jsonl

Start here to see what a step does; `recipes/sft.py` does the same on any number of ranks under
DeepSpeed ZeRO-3, with stability, other policies, checkpoints and reports. `tests/test_minimal.py`
holds the two equal. Adaptation only: stability needs a Fisher and the reference weights, which
`score_tokens` takes as `fisher` and `reference`.

Shape legend: B rows, T positions, R response positions, K kept positions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from alphatoken import ValuationConfig, score_tokens
from alphatoken.batch import IGNORE_INDEX, loss_positions
from alphatoken.data.batches import Order
from alphatoken.data.chat import EncodedDocument, Encoder, Skipped

WEIGHT_DECAY = 0.01
WARMUP_RATIO = 0.03
CLIP = 1.0
TRAINING, HELD_OUT = 0, 1  # streams of random numbers: training rows, held-out draws


def read_rows(file: Path, encoder: Encoder) -> list[EncodedDocument]:
    """Tokenises a JSONL file of {"prompt", "response"} or {"messages"}; unusable rows are left
    out."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [encoder.encode(json.loads(line), where=f"{file}:{n}") for n, line in enumerate(lines)]
    return [row.documents[0] for rows in found if not isinstance(rows, Skipped) for row in rows]


def padded(
    rows: Sequence[EncodedDocument], pad_token: int, device: torch.device
) -> dict[str, Tensor]:
    """Lays rows into one batch, padded on the right: `input_ids`, `attention_mask`, `labels`, (B,
    T) int64 each. Labels are the tokens of the response, IGNORE_INDEX elsewhere."""
    shape = len(rows), max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": torch.full(shape, pad_token),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
    }
    for number, row in enumerate(rows):
        ids, length = torch.tensor(row.input_ids), len(row.input_ids)
        in_response = torch.tensor(row.response_mask)
        batch["input_ids"][number, :length] = ids
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.where(in_response, ids, IGNORE_INDEX)
    return {name: column.to(device) for name, column in batch.items()}


def best(value_BT: Tensor, response_BT: Tensor, keep_ratio: float) -> Tensor:
    """Marks the `keep_ratio` most valuable response tokens of a micro-batch, (B, T) bool; ties go
    to the earlier position."""
    value_R = value_BT[response_BT]
    best_first_R = value_R.argsort(descending=True, stable=True)
    kept_R = torch.zeros_like(value_R, dtype=torch.bool)
    kept_R[best_first_R[: math.ceil(keep_ratio * len(value_R))]] = True
    kept_BT = torch.zeros_like(response_BT)
    kept_BT[response_BT] = kept_R
    return kept_BT


def main(arguments: Sequence[str] | None = None) -> tuple[PreTrainedModel, list[float]]:
    """Trains as the command line says. Returns the model and each step's loss, per kept token."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pad_token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoder = Encoder(tokenizer, options.max_length)
    train = read_rows(options.train, encoder)
    validation = read_rows(options.validation, encoder)
    train_order = Order([len(train)], None, seed=(options.seed, TRAINING))
    held_out_order = Order([len(validation)], None, seed=(options.seed, HELD_OUT))

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    model.train()
    decayed = [weight for weight in model.parameters() if weight.dim() >= 2]
    exempt = [weight for weight in model.parameters() if weight.dim() < 2]  # norms and biases
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=options.lr,
    )
    warmup = math.ceil(WARMUP_RATIO * options.steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, options.steps)
    valuation = ValuationConfig(layers=options.layers, window=options.window)

    losses = []
    for step in range(options.steps):
        # Rows of like length go together, so that little is padded.
        rows = [train[row] for row in train_order.step(step, options.batch)]
        rows.sort(key=lambda row: -len(row.input_ids))
        batches = [
            padded(rows[start : start + options.micro_batch], pad_token, device)
            for start in range(0, len(rows), options.micro_batch)
        ]
        drawn = [validation[row] for row in held_out_order.step(step, options.held_out)]
        held_out = padded(drawn, pad_token, device)

        # Score and select: what does each response token do for the held-out loss?
        kept = []
        for batch in batches:
            values = score_tokens(model, batch, held_out, config=valuation)
            response_BT, _ = loss_positions(batch["labels"])
            kept.append(best(values.composite, response_BT, options.keep_ratio))
        kept_tokens = sum(int(kept_BT.sum()) for kept_BT in kept)

        # Train: the mean loss of the kept tokens of the whole step.
        step_loss = 0.0
        for batch, kept_BT in zip(batches, kept, strict=True):
            _, targets_BT = loss_positions(batch["labels"])
            # Nothing real attends to padding on the right, so no mask is needed.
            logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
            logits_KV = logits_BTV[kept_BT].float()
            loss = cross_entropy(logits_KV, targets_BT[kept_BT], reduction="sum") / kept_tokens
            loss.backward()
            step_loss += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        losses.append(step_loss)
        print(
            f"step {step + 1}/{options.steps}  loss {step_loss:.4f}  kept {kept_tokens}  lr "
            f"{rate:.2e}  gradient norm {float(norm):.3f}"
        )
    if options.output is not None:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    return model, losses


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--train", type=Path, required=True, help="JSONL rows to train on")
    parser.add_argument("--validation", type=Path, required=True, help="held-out JSONL rows")
    parser.add_argument("--output", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per forward pass")
    parser.add_argument("--held-out", type=int, default=4, help="held-out rows per step")
    parser.add_argument("--layers", type=int, default=3, help="last layers that are scored")
    parser.add_argument("--window", type=int, default=32, help="reach of the causal path")
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="share of tokens kept")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
