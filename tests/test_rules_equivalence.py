"""Our losses under the rules of the field against those of TRL, LLaMA-Factory and others, written
from their formulas: on the model's own logits losses and gradients, plain, packed and with
adapters, over micro-batches, and weights after training on two ranks; on pairs the losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import alphatoken.training.metrics  # noqa: F401  declares the metrics of runs
from alphatoken.batch import Batch, make_batch
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.models.decoder import decoder_of
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.select import select
from alphatoken.selection.step import selections_at
from alphatoken.training.valued_model import ValuedModel
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.registry import build_scorer
from tests.published import LOSSES, cross_entropy, token_adaptive
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of
from tests.test_preference import Tokens
from tests.tiny import collate, pack, random_sequences, tiny_llama

Sequence_ = tuple[Tensor, Tensor]
TokenLoss = Callable[[Tensor, Tensor], Tensor]
CPU = torch.device("cpu")
# Two micro-batches of unequal lengths.
LENGTHS = [[(3, 9), (4, 2), (2, 5)], [(5, 12), (3, 1)]]
VETO = {"by": "probability", "threshold": 0.1}
SECTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "dft": {"weights": "dft"},
    "eaft": {"weights": "eaft"},
    "talr": {"weights": "talr"},
    "profit": {"veto": VETO},
}


def config_of(rule: str, **valuation: Any) -> RunConfig:
    selection = {"policy": "all", "normalise": "response", **SECTIONS[rule]}
    values = {
        "model": {"name_or_path": "none"},
        "data": {"train": "none", "validation": "other"},
        "train": {"output_dir": "none"},
        "valuation": {"enabled": False, **valuation},
        "selection": selection,
    }
    return validate(RunConfig, values, "of the test")


def micro_batch(sequences: Sequence[Sequence_], *, packed: bool) -> Batch:
    """As `data.batches` makes it: packed into two rows, or padded on the right."""
    if not packed:
        columns = collate(sequences)
        inside = columns.pop("attention_mask").bool()
        numbers = torch.arange(len(sequences))[:, None]
        columns["document_ids"] = torch.where(inside, numbers, -1)
    else:
        columns = pack(sequences, rows=2)
        inside = columns.pop("attention_mask").bool()
        documents = columns["document_ids"]
        starts = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
        index = torch.arange(documents.shape[1]).expand(documents.shape)
        columns["position_ids"] = index - torch.where(starts, index, 0).cummax(1).values
        columns["labels"] = columns["labels"].masked_fill(starts, -100)
        # `pack` numbers documents within their row.
        first_of_row = documents.amax(1, keepdim=True).add(1).cumsum(0).roll(1, 0)
        first_of_row[0] = 0
        columns["document_ids"] = torch.where(inside, documents + first_of_row, -1)
    columns["rows"] = torch.arange(len(sequences))
    return make_batch(columns)


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def published(
    model: PreTrainedModel, micro_batches: Sequence[Sequence[Sequence_]], rule: str
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step, one sequence at a time."""
    total, tokens = torch.zeros(()), 0
    for sequences in micro_batches:
        logits, targets = [], []
        for ids, labels in sequences:
            counts = labels[1:] != -100
            logits.append(model(input_ids=ids[None]).logits[0, :-1][counts].double())
            targets.append(labels[1:][counts])
        token_loss: TokenLoss
        if rule == "talr":
            means = [
                float(cross_entropy(*pair).detach().mean())
                for pair in zip(logits, targets, strict=True)
            ]
            token_loss = partial(token_adaptive, tau=statistics.median(means))
        else:
            token_loss = LOSSES[rule]
        total = total + token_loss(torch.cat(logits), torch.cat(targets)).sum()
        tokens += len(torch.cat(targets))
    loss = total / tokens
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def valued_model(
    model: PreTrainedModel, config: RunConfig, batches: Sequence[Batch]
) -> ValuedModel:
    """The engine's model of a configuration; values are refreshed on the batches themselves."""
    decoder = decoder_of(model)
    valued = ValuedModel(
        decoder=decoder,
        objective=SupervisedObjective(),
        selections=selections_at(config, 0, 1),
        eos_token_ids=[2],
        stopwatch=Stopwatch(CPU),
        needs_entropy=config.needs_entropy,
    )
    if config.valuation.enabled:
        scorer = build_scorer(decoder, config.valuation, CPU, None)
        scorer.refresh(batches)
        valued.attach(scorer)
    return valued


def ours(
    model: PreTrainedModel, batches: Sequence[Batch], config: RunConfig
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step, over its micro-batches."""
    valued = valued_model(model, config, batches)
    tokens = sum(int(batch["response"].sum()) for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        total = valued(batch)["total"] / tokens
        total.backward()
        loss += total.detach()
    return float(loss), gradients_of(model)


def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model with adapters that already do something."""
    settings = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear")
    adapted: Any = peft.get_peft_model(model, settings).base_model.model
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return adapted


@pytest.mark.parametrize("layout", ["padded", "packed", "adapters"])
@pytest.mark.parametrize("rule", SECTIONS)
def test_losses_and_gradients_are_the_published_ones(rule: str, layout: str) -> None:
    model = with_adapters(tiny_llama()) if layout == "adapters" else tiny_llama()
    sequences = [random_sequences(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    batches = [micro_batch(each, packed=layout == "packed") for each in sequences]
    loss, gradients = ours(model, batches, config_of(rule))
    expected_loss, expected = published(model, sequences, rule)
    assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((gradients[name] - gradient).abs().max())
        assert error <= 1e-6 * max(1.0, float(gradient.abs().max())), f"{name} is off by {error}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("estimator", ["ghost", "exact", None])
def test_entropy_is_known_with_and_without_a_scorer(estimator: str | None, packed: bool) -> None:
    """Within the training pass, and ahead of it as with scope `global_batch`."""
    model = tiny_llama()
    valuation: dict[str, Any] = {"layers": 2, "stability_weight": 0.0}
    if estimator is not None:
        valuation |= {"enabled": True, "estimator": estimator}
    sequences = random_sequences(LENGTHS[0], seed=0)
    batch = micro_batch(sequences, packed=packed)
    valued = valued_model(model, config_of("eaft", **valuation), [batch])
    for facts in (valued(batch)["facts"], valued.assess(batch)):
        assert ("composite" in facts.values) == (estimator is not None)
        assert not facts.entropy_BT[~batch["response"]].any()
        # `pack` deals sequences out to two rows.
        dealt = [*sequences[::2], *sequences[1::2]] if packed else sequences
        for number, (ids, labels) in enumerate(dealt):
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1][labels[1:] != -100]
            share = logits.double().softmax(-1).sort(-1).values[:, -20:]
            share /= share.sum(-1, keepdim=True)
            own = batch["response"] & (batch["document_ids"] == number)
            entropy = torch.special.entr(share).sum(-1)
            assert torch.allclose(facts.entropy_BT[own].double(), entropy, atol=1e-5)


def pair_loss(tokens: Tokens, sections: dict[str, Any]) -> float:
    """The objective of a micro-batch of pairs under a configuration, summed over its pairs."""
    values = {
        "model": {"name_or_path": "none"},
        "data": {"train": "none"},
        "train": {"output_dir": "none"},
        "valuation": {"enabled": False},
        **sections,
    }
    config = validate(PreferenceRunConfig, values, "of the test")
    facts = TokenFacts(
        batch=tokens.batch,
        nll_BT=tokens.nll_BT,
        protected_BT=torch.zeros_like(tokens.response_BT),
        values={},
    )
    weight_BT = torch.zeros_like(tokens.nll_BT)
    selections = selections_at(config, 0, 1)
    weight_BT[tokens.response_BT] = select(selections, facts).choice.weight_R
    return float(PreferenceObjective(config.preference).total(tokens.kept(weight_BT)))


def test_confpo_is_simpo_on_improbable_tokens() -> None:
    """-log sigmoid(beta (mean log p+ - mean log p-) - gamma) over the tokens of each response whose
    probability is below its mean; the pair with a response of one token has none."""
    lengths, beta, gamma = [(4, 7), (1, 3), (6, 6)], 2.0, 0.7
    tokens, expected = Tokens(lengths), 0.0
    for pair in (0, 2):
        means = []
        for document in (2 * pair, 2 * pair + 1):
            log_p = -tokens.of_document(tokens.nll_BT, document).double()
            means.append(log_p[log_p.exp() < log_p.exp().mean()].mean())
        expected -= float(torch.sigmoid(beta * (means[0] - means[1]) - gamma).log())
    sections = {
        "preference": {"objective": "simpo", "beta": beta, "margin": gamma},
        "selection": {
            "policy": "all",
            "veto": {"by": "below_mean_probability", "threshold": 0.0},
        },
    }
    assert pair_loss(tokens, sections) == pytest.approx(expected, rel=1e-6)


def test_selective_dpo_is_dpo_on_the_tokens_that_have_most_to_gain() -> None:
    """Of chosen responses those with the largest log p_ref - log p, of rejected ones with the
    largest log p - log p_ref."""
    lengths, beta = [(5, 10), (1, 3), (6, 6)], 0.2
    tokens, expected = Tokens(lengths), 0.0
    for pair in range(len(lengths)):
        ratios = []
        for document, sign in ((2 * pair, -1), (2 * pair + 1, 1)):
            log_p = -tokens.of_document(tokens.nll_BT, document).double()
            log_ref = -tokens.of_document(tokens.batch["reference_nll"], document).double()
            score = (sign * (log_p - log_ref)).tolist()
            best = sorted(range(len(score)), key=lambda place: -score[place])
            kept = best[: math.ceil(0.4 * len(score) - 1e-9)]
            ratios.append((log_p - log_ref)[kept].sum())
        expected -= float(torch.sigmoid(beta * (ratios[0] - ratios[1])).log())
    sections = {
        "preference": {"objective": "dpo", "beta": beta},
        "reference": {"model": "another"},
        "selection": {
            "keep_ratio": 0.4,
            "scope": "sequence",
            "chosen": {"policy": "excess_loss"},
            "rejected": {"policy": "retrospective_excess_loss"},
        },
    }
    assert pair_loss(tokens, sections) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dft", "eaft"])
def test_training_on_two_ranks_is_the_published_training(
    rule: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    """ZeRO-3, gradients accumulated over micro-batches, clipping and a schedule: the weights after
    some steps."""
    values = changed(
        run_values,
        train={"max_steps": 3, "output_dir": str(tmp_path / "run")},
        valuation={"enabled": False},
        selection={"policy": "all", "normalise": "response", **SECTIONS[rule]},
    )
    values["selection"].pop("keep_ratio", None)
    (plain, _) = run_ranks(
        "plain_deepspeed_loop",
        2,
        tmp_path / "plain",
        values=values,
        steps=3,
        token_loss=rule,
    )
    assert run_ranks("run_trainers", 2, tmp_path / "ours", configs={rule: values}) == (
        [{rule: ""}] * 2
    )
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").state_dict()
    for name, expected in plain["weights"].items():
        error = float((weights[name] - expected).abs().max())
        assert error <= 1e-6, f"{name} is off by {error:.1e}"


@pytest.mark.slow
def test_rules_are_the_same_on_any_number_of_ranks(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Those that look at several sequences, or at more than losses, without values and with them,
    within the pass and ahead of it."""
    off = {"enabled": False}
    sections: dict[str, dict[str, Any]] = {
        "talr": {"valuation": off, "selection": {"weights": "talr", "scope": "global_batch"}},
        "eaft, packed": {
            "valuation": off,
            "selection": {"weights": "eaft"},
            "data": {"packing": True},
        },
        "eaft, valued": {"selection": {"weights": "eaft", "scope": "global_batch"}},
        "gibbs": {"selection": {"weights": "gibbs", "weight_parameters": {"temperature": 0.5}}},
        "start": {
            "valuation": off,
            "selection": {"veto": {"by": "reference_probability", "share": 0.3}},
        },
    }
    common = changed(run_values, valuation={"stability_weight": 0.0}, train={"max_steps": 2})
    for ranks in (1, 2):
        configs = {}
        for name, content in sections.items():
            selection = {"policy": "all", "normalise": "response", **content["selection"]}
            values = changed(common, **{**content, "selection": selection})
            configs[name] = changed(values, train={"output_dir": str(tmp_path / f"{name}-{ranks}")})
        found = run_ranks("run_trainers", ranks, tmp_path / f"ranks-{ranks}", configs=configs)
        assert found == [dict.fromkeys(configs, "")] * ranks
    for name in sections:
        one, two = (metrics_of(tmp_path / f"{name}-{ranks}") for ranks in (1, 2))
        assert len(one) == 3
        for ours, theirs in zip(two, one, strict=True):
            for key in theirs.keys() & {"loss_kept", "loss_response", "grad_norm", "kept_tokens"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (
                    f"{name}, step {ours['step']}: {key}"
                )
    start = metrics_of(tmp_path / "start-1")[1:]
    kept = [step["kept_tokens"] / step["response_tokens"] for step in start]
    assert kept == pytest.approx([0.7, 0.7], abs=0.05)
