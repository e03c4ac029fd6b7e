"""`valuation.target: preference`: values by the gradient of the held-out preference loss, against
autograd of its published definition and against one plain process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken import TokenValues, UserError, ValuationConfig, score_tokens
from alphatoken.batch import Batch, make_batch
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.values.registry import build_scorer
from tests.exact_oracle import exact_values
from tests.oracle import Scored, oracle_copy, relative_error, token_values
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of, run_recipe
from tests.test_distributed import check, exact, stage, variant
from tests.test_pairs import REFERENCE_FREE, REPORTED, PlainPairs
from tests.test_preference import OBJECTIVES, objective_of, section, standard
from tests.test_training import METRICS
from tests.test_valuation import LENGTHS, scored_set
from tests.tiny import CASES, collate, pack, random_sequences, scored_linears, unpad

# Chosen and rejected in turn; uneven, and in another order by length than as pairs.
PAIR_LENGTHS = [(4, 6), (4, 2), (2, 11), (2, 5), (7, 3), (7, 13)]
SEQUENCES = random_sequences(LENGTHS, 1)
PAIRS = random_sequences(PAIR_LENGTHS, 2)


def references(seed: int = 5) -> list[Tensor]:
    """Made-up losses of a reference model, (R,) of every document."""
    generator = torch.Generator().manual_seed(seed)
    return [4 + torch.randn(response, generator=generator) for _, response in PAIR_LENGTHS]


def preference_loss(name: str, losses: Sequence[Tensor]) -> Tensor:
    """The published definition, summed over pairs, from the token losses of both responses."""
    reference = [-each.to(losses[0].dtype) for each in references()]
    pairs = [
        standard(name, -losses[place], -losses[place + 1], (reference[place], reference[place + 1]))
        for place in range(0, len(losses), 2)
    ]
    return torch.stack(pairs).sum()


def target_matrices(model: PreTrainedModel, scored: Scored, name: str) -> dict[str, Tensor]:
    """Per linear, 1/N sum over response positions v of d_v h_v^T, with d_v the gradient of the
    preference loss of all pairs at the linear's output."""
    twin = oracle_copy(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {linear: [] for linear in scored.linears}
    for linear, calls in seen.items():

        def remember(
            _module: object,
            args: tuple[Tensor, ...],
            output: Tensor,
            calls: list[tuple[Tensor, Tensor]] = calls,
        ) -> None:
            output.retain_grad()
            calls.append((args[0][0].detach(), output))

        twin.get_submodule(linear.removesuffix(".weight")).register_forward_hook(remember)
    losses, responses = [], []
    for ids, labels in PAIRS:
        log_p = torch.log_softmax(twin(input_ids=ids[None], use_cache=False).logits[0], dim=-1)
        response = [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
        losses.append(torch.stack([-log_p[t, labels[t + 1]] for t in response]))
        responses.append(response)
    preference_loss(name, losses).backward()
    count = sum(map(len, responses))
    matrices = {}
    for linear, calls in seen.items():
        outers = []
        for (act_TI, output), response in zip(calls, responses, strict=True):
            assert output.grad is not None
            outers += [torch.outer(output.grad[0][v], act_TI[v]) for v in response]
        matrices[linear] = torch.stack(outers).sum(0) / count
    return matrices


def held_out_batch(*, packed: bool) -> Batch:
    """All pairs as one micro-batch, each document in a row of its own or all of them in two."""
    columns = collate(PAIRS)
    columns["document_ids"] = torch.arange(len(PAIRS))[:, None] * columns["attention_mask"]
    columns["document_ids"] += columns["attention_mask"] - 1  # -1 on padding
    if packed:
        columns = pack(PAIRS, 2)
        ids = columns["document_ids"]
        row = torch.arange(2)[:, None].expand_as(ids)
        columns["document_ids"] = torch.where(ids >= 0, 2 * ids + row, -1)
        starts = columns["document_ids"].diff(dim=1, prepend=torch.full((2, 1), -2)) != 0
        index = torch.arange(ids.shape[1]).expand_as(ids)
        columns["position_ids"] = index - torch.where(starts, index, 0).cummax(dim=1).values
        columns["labels"] = columns["labels"].masked_fill(starts, -100)
    columns.pop("attention_mask")
    batch = make_batch(columns)
    batch["rows"] = torch.arange(len(PAIRS) // 2).repeat_interleave(2)
    batch["reference_nll"] = torch.zeros(batch["response"].shape)
    for document, losses in enumerate(references()):
        batch["reference_nll"][batch["response"] & (batch["document_ids"] == document)] = losses
    return batch


def scored_by_pairs(
    model: PreTrainedModel, name: str, config: dict[str, Any], *, packed: bool
) -> Any:
    """Values of `SEQUENCES` by the held-out pairs."""
    decoder = decoder_of(model.eval())
    settings = ValuationConfig.model_validate({**config, "target": "preference"})
    scorer = build_scorer(decoder, settings, torch.device("cpu"), drift=None)
    held_out = held_out_batch(packed=packed)
    rows = make_batch({key: each for key, each in collate(SEQUENCES).items() if "mask" not in key})
    with torch.no_grad():
        losses = scorer.refresh([held_out], 100, coefficients=objective_of(name).coefficients)
        with scorer.capture() as capture:
            decoder.hidden_states(rows)
        values = scorer.score(capture.entry, rows).values
    assert len(losses) == 1
    twin = oracle_copy(model)
    for document, (ids, labels) in enumerate(PAIRS):
        log_p = torch.log_softmax(twin(input_ids=ids[None]).logits[0], dim=-1)
        own = losses[0][held_out["response"] & (held_out["document_ids"] == document)]
        expected = [-log_p[t, labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] != -100]
        assert relative_error(own, torch.stack(expected).detach()) <= 1e-4, (
            "the losses are not weighed"
        )
    return values


WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "resident, a chunk per row": {"residency": "resident", "chunk_tokens": 1},
    "streamed, a chunk per row": {"residency": "streamed", "chunk_tokens": 1},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ghost_values_are_those_of_the_held_out_preference_loss(name: str) -> None:
    case = CASES["llama"]
    model = case.build()
    scored = scored_set(case, model, depth=2)
    expected = token_values(
        model,
        SEQUENCES,
        [],
        scored=scored,
        window=4,
        stability_weight=0.0,
        target=target_matrices(model, scored, name),
    )
    for way, keys in WAYS.items():
        for contraction in ("ghost", "materialised"):
            config = {"layers": 2, "window": 4, "contraction": contraction, **keys}
            values = scored_by_pairs(model, name, config, packed="chunk_tokens" not in keys)
            for term in ("direct_target", "causal_target", "composite"):
                error = relative_error(
                    torch.cat(unpad(getattr(values, term), SEQUENCES)),
                    torch.cat([row[term] for row in expected]),
                )
                assert error <= 1e-4, f"{name}, {way}, {contraction}: {term} is off by {error:.1e}"


@pytest.mark.parametrize("parameters", ["linears", "all"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_exact_values_are_those_of_the_held_out_preference_loss(name: str, parameters: str) -> None:
    case = CASES["llama"]
    model = case.build()
    depth = 2 if parameters == "linears" else "all"
    names = list(scored_linears(case, model, 2))
    if parameters == "all":
        names = [each for each, _ in model.named_parameters()]

    def held_out_loss(losses: list[Tensor]) -> Tensor:
        return preference_loss(name, losses)

    expected = exact_values(model, SEQUENCES, PAIRS, names, held_out_loss=held_out_loss)
    for way, keys in WAYS.items():
        config = {"estimator": "exact", "layers": depth, "parameters": parameters, **keys}
        values = scored_by_pairs(model, name, config, packed="chunk_tokens" not in keys)
        error = relative_error(
            torch.cat(unpad(values.composite, SEQUENCES)),
            torch.cat([row["direct_target"] for row in expected]),
        )
        assert error <= 1e-4, f"{name}, {way}: off by {error:.1e}"


@pytest.mark.slow
def test_values_masks_and_gradients_equal_one_process_on_1_2_and_3_ranks(
    pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """Five held-out pairs, which no number of ranks divides, with references cached, online and
    offloaded."""
    packed = {"data": {"packing": True}}
    one_by_one = {"chunk_tokens": 1}
    streamed = {**one_by_one, "residency": "streamed"}
    variants: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
        "resident": ("dpo", {"valuation": one_by_one}),
        "exact, packed": ("dpo, smoothed", {"valuation": exact("all", "all"), **packed}),
        "streamed, packed, offloaded": (
            "alpha_dpo",
            {
                "valuation": streamed,
                "reference": {"mode": "online", "offload": True},
                **packed,
            },
        ),
        "exact, online, stage 2": (
            "ipo",
            {
                "valuation": exact("linears", 2),
                "reference": {"mode": "online"},
                "deepspeed": stage(2),
            },
        ),
        "materialised, simpo": (
            "simpo",
            {"valuation": {"contraction": "materialised"}, "selection": {"scope": "sequence"}},
        ),
        "exact, orpo": ("orpo", {"valuation": exact("linears", 2)}),
        "cpo": ("cpo", packed),
    }
    configs, plain = {}, {}
    alone: dict[str, TokenValues] = {}
    for name, (objective, sections) in variants.items():
        valuation = {**stability, "target": "preference", **sections.get("valuation", {})}
        merged = {**sections, "preference": section(objective), "valuation": valuation}
        if section(objective)["objective"] not in REFERENCE_FREE:
            merged["reference"] = {"model": stability["reference"], **sections.get("reference", {})}
        configs[name] = variant(pair_values, tmp_path / name.replace(" ", "-"), **merged)
        reference = {"model": stability["reference"]}
        plain[name] = PlainPairs({**configs[name], "reference": reference}, objective, alone)
        assert plain[name].values.direct_proxy.any()
    for ranks in (1, 2, 3):
        names = ("resident", "exact, packed") if ranks == 1 else tuple(configs)
        own = {
            name: changed(configs[name], train={"output_dir": str(tmp_path / f"{name}-{ranks}")})
            for name in names
        }
        results = run_ranks("valued_steps", ranks, tmp_path / f"ranks-{ranks}", configs=own)
        for name in names:
            check(results, name, plain[name])


@pytest.mark.slow
def test_the_recipe_runs_and_refuses_rows_that_are_no_pairs(
    run_values: dict[str, Any], pair_values: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    values = changed(pair_values, valuation={"target": "preference"}, train={"save_every": 1})
    file.write_text(yaml.safe_dump(values))
    validation = f"data.validation={run_values['data']['validation']}"
    wrong = run_recipe(file, validation, recipe="preference")
    assert wrong.returncode != 0
    assert (
        "validation.jsonl:1: valuation.target=preference compares held-out pairs, but this row of "
        "data.validation has prompt, response; give it rows with 'prompt', 'chosen' and "
        "'rejected', or set valuation.target=sft"
    ) in " ".join(wrong.stderr.split())

    finished = run_recipe(file, recipe="preference")
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "Reference losses of data.validation" in finished.stdout
    _, *steps = metrics_of(values["train"]["output_dir"])
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step.keys() >= METRICS | REPORTED
        assert math.isfinite(step["composite_mean_chosen"])
    (file.parent / "run" / "metrics.jsonl").rename(tmp_path / "whole.jsonl")
    resumed = run_recipe(file, "train.resume=auto", "valuation.target=sft", recipe="preference")
    assert "valuation.target" in resumed.stderr


def test_supervised_runs_and_score_tokens_refuse_it(
    run_values: dict[str, Any], pair_values: dict[str, Any]
) -> None:
    target = {"valuation": {"target": "preference"}}
    assert validate(PreferenceRunConfig, changed(pair_values, **target), "of the test")
    with pytest.raises(UserError, match=r"needs pairs: run recipes/preference.py with"):
        validate(RunConfig, changed(run_values, **target), "of the test")
    batch = collate(SEQUENCES)
    with pytest.raises(UserError, match="score_tokens knows no pairs: leave it at sft"):
        score_tokens(
            CASES["llama"].build(), batch, batch, config=ValuationConfig(target="preference")
        )
