"""Follows one token from its row to the gradient and prints every number on the way.

    python -m recipes.trace

`docs/walkthrough.md` explains the output, and `tests/test_walkthrough.py` holds that page to it.
The model is the tiny random one of the quickstart, so the numbers are real and mean nothing.

Shape legend: B rows, T positions, R response positions, I and O the features of a linear.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from alphatoken import ValuationConfig, score_tokens
from alphatoken.batch import Batch, make_batch
from alphatoken.data.chat import Encoder, Skipped
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.values.algebra import FromMatrix, target_matrix
from alphatoken.values.ghost.contract import Contractions, contract
from alphatoken.values.ghost.signals import LinearSignals, SignalConsumer
from alphatoken.values.ghost.tower import Tower
from recipes.minimal import best, padded
from recipes.quickstart.get_model import save_tiny

ROW = {"prompt": "6 * 7 = ?", "response": "It is 42."}
HELD_OUT_ROW = {"prompt": "5 * 7 = ?", "response": "It is 35."}
LAYERS, WINDOW, STABILITY_WEIGHT, KEEP_RATIO = 2, 4, 1.5, 0.5
PLACE = 6
"""Which response token is followed, from 0: the one that predicts the 4 of 42."""
SHOWN = "model.layers.3.self_attn.v_proj.weight"
"""The linear whose signals are printed: the value projection of the last layer."""
TERMS = ("direct_target", "causal_target", "direct_proxy", "causal_proxy")
"""The terms of the published value, which has no contrast."""


def main() -> None:
    """Prints the whole way of one token."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tiny")
        decoder = decoder_of(AutoModelForCausalLM.from_pretrained(Path(folder) / "tiny"))
    batch, t = show_row(tokenizer)
    held_out = make_batch(encoded(tokenizer, HELD_OUT_ROW))
    reference = take_a_step(decoder, batch)

    signals = show_signals(decoder, batch, t)
    value_BT = show_contraction(decoder, signals, held_out, reference, t)
    check(decoder, batch, held_out, reference, value_BT)
    show_training(decoder, batch, value_BT, t)


def encoded(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, Tensor]:
    """One row as a batch of its own, (1, T) each."""
    found = Encoder(tokenizer, max_length=64).encode(row, where="the trace")
    assert not isinstance(found, Skipped)
    (tokens,) = found
    return padded(tokens.documents, tokenizer.pad_token_id, torch.device("cpu"))


def show_row(tokenizer: PreTrainedTokenizerBase) -> tuple[Batch, int]:
    """Row, tokens and loss positions. Returns the batch, and the position that is followed."""
    batch = make_batch(encoded(tokenizer, ROW))
    positions = batch["response"][0].nonzero()[:, 0].tolist()
    t = positions[PLACE]
    token, target = (tokenizer.decode([int(batch[key][0, t])]) for key in ("input_ids", "targets"))
    print("ROW")
    print(f"  {batch['input_ids'].shape[1]} tokens, {len(positions)} of the response")
    print(f"  response positions {positions[0]} to {positions[-1]}; we follow t = {t}")
    print(f"  input_ids[t] is {token!r}, targets[t] = input_ids[t + 1] is {target!r}")
    return batch, t


def take_a_step(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
    """Moves the weights by one step of gradient descent, so that there is drift. Returns the scored
    weights from before: W_ref."""
    linears = [linear.name for linear in decoder.scored_linears(LAYERS)]
    reference = {name: decoder.model.get_parameter(name).detach().clone() for name in linears}
    losses(decoder, batch, batch["response"]).mean().backward()
    with torch.no_grad():
        for weight in decoder.model.parameters():
            if weight.grad is not None:
                weight -= 0.1 * weight.grad
                weight.grad = None
    return reference


def losses(decoder: Decoder, batch: Batch, positions_BT: Tensor) -> Tensor:
    """The losses at the given positions, (R,), with their graph."""
    hidden_RH = decoder.hidden_states({"input_ids": batch["input_ids"]})[positions_BT]
    return cross_entropy(decoder.head(hidden_RH), batch["targets"][positions_BT], reduction="none")


def run_tower(
    decoder: Decoder, batch: Batch, window: int
) -> tuple[Tensor, Tensor, dict[str, LinearSignals]]:
    """Runs the decoder and the tower, with a causal path over so many positions. Returns the entry,
    (B, T, H), the token losses, (B, T), and the signals of every scored linear by name."""
    found: dict[str, LinearSignals] = {}

    @contextmanager
    def keeping(layer: int) -> Iterator[SignalConsumer]:
        def keep(signals: LinearSignals) -> None:
            found[signals.linear.name] = signals

        yield keep

    tower = Tower(decoder, LAYERS, torch.device("cpu"))
    tower.refresh()
    with torch.no_grad(), tower.capture() as capture:
        decoder.hidden_states({"input_ids": batch["input_ids"]})
    nll_BT = tower.run(capture.entry, batch, keeping, window=window)
    return capture.entry.first_BTH, nll_BT, found


def show_signals(decoder: Decoder, batch: Batch, t: int) -> dict[str, LinearSignals]:
    """Runs the tower on the row; returns the signals of every scored linear by name."""
    entry_BTH, nll_BT, signals = run_tower(decoder, batch, WINDOW)
    shown = signals[SHOWN]
    assert shown.mixed_BTO is not None
    print("SIGNALS")
    print(f"  state that enters the scored layers: {tuple(entry_BTH.shape)}")
    print(f"  loss of t: {float(nll_BT[0, t]):.4f}")
    print(f"  {len(signals)} linears with signals; of {SHOWN}:")
    print(f"    |h_t| = {float(shown.act_BTI[0, t].norm()):.4g}")
    print(f"    |d_t| = {float(shown.outgrad_BTO[0, t].norm()):.4g}")
    print(f"    |sum_k A[k,t] d_k| = {float(shown.mixed_BTO[0, t].norm()):.4g}")
    return signals


def show_contraction(
    decoder: Decoder,
    signals: dict[str, LinearSignals],
    held_out: Batch,
    reference: dict[str, Tensor],
    t: int,
) -> Tensor:
    """G and V of every linear, the four terms, and their sum: the value, (B, T)."""
    _, _, held_out_signals = run_tower(decoder, held_out, 0)
    index = signals[SHOWN].chunk.index
    sums = {term: torch.zeros(index.count) for term in TERMS}
    print("CONTRACTION")
    for name, ours in signals.items():
        theirs = held_out_signals[name]
        d_NO, h_NI = theirs.outgrad_RO, theirs.act_RI
        g_OI = target_matrix(d_NO, h_NI) / len(h_NI)
        v_OI = decoder.model.get_parameter(name).detach() - reference[name]  # with a Fisher of 1
        terms = contract(ours, Contractions(target=FromMatrix(g_OI), proxy=FromMatrix(v_OI)))
        for term, value_R in terms.items():
            sums[term] += value_R
        if name == SHOWN:
            print(f"  {name}: |G| = {float(g_OI.norm()):.4g}, |V| = {float(v_OI.norm()):.4g}")
            place = index.index_R.tolist().index(t)
            for term in TERMS:
                print(f"    {term} {float(terms[term][place]):+.4g}")
    sums = {term: index.put(sum_R) for term, sum_R in sums.items()}  # back in their positions
    adaptation_BT = sums["direct_target"] + sums["causal_target"]
    stability_BT = sums["direct_proxy"] + sums["causal_proxy"]
    value_BT = adaptation_BT + STABILITY_WEIGHT * stability_BT
    print(f"  all {len(signals)} linears:")
    for term in TERMS:
        print(f"    {term} {float(sums[term][0, t]):+.4g}")
    print(f"  value(t) = {float(value_BT[0, t]):+.4g}")
    return value_BT


def check(
    decoder: Decoder,
    batch: Batch,
    held_out: Batch,
    reference: dict[str, Tensor],
    value_BT: Tensor,
) -> None:
    """Holds the values to those of `score_tokens`."""
    columns = [
        {
            "input_ids": each["input_ids"],
            "labels": each["labels"],
            "attention_mask": torch.ones_like(each["labels"]),
        }
        for each in (batch, held_out)
    ]
    values = score_tokens(
        decoder.model,
        *columns,
        fisher={name: torch.ones_like(weight) for name, weight in reference.items()},
        reference=reference,
        config=ValuationConfig(layers=LAYERS, window=WINDOW, stability_weight=STABILITY_WEIGHT),
    )
    error = float((values.composite - value_BT).abs().max() / value_BT.abs().max())
    assert error < 1e-4, f"score_tokens differs by {error:.1e}"
    print(f"  score_tokens says the same of all {int(batch['response'].sum())} tokens")


def show_training(decoder: Decoder, batch: Batch, value_BT: Tensor, t: int) -> None:
    """Selection, and the training pass of the kept tokens."""
    kept_BT = best(value_BT, batch["response"], KEEP_RATIO)
    rank = int((value_BT[batch["response"]] > value_BT[0, t]).sum()) + 1
    print("TRAINING")
    print(f"  t is number {rank} of {int(batch['response'].sum())} by value")
    print(f"  {int(kept_BT.sum())} tokens are kept, t {'too' if kept_BT[0, t] else 'not'}")
    loss = losses(decoder, batch, kept_BT).mean()
    loss.backward()
    gradient = decoder.model.get_parameter(SHOWN).grad
    assert gradient is not None
    print(f"  loss of the step: {float(loss.detach()):.4f}")
    print(f"  |gradient of {SHOWN}| = {float(gradient.norm()):.4g}")


if __name__ == "__main__":
    main()
