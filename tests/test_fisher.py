"""The Monte-Carlo Fisher against the float64 oracle: squares, samples and what they converge to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from functools import cache
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alphatoken.batch import make_batch
from alphatoken.models import head as head_module
from alphatoken.models.decoder import decoder_of
from alphatoken.models.head import draw_tokens, head_samples
from alphatoken.models.scored import ParameterSet
from alphatoken.stability import squares as square_rules
from alphatoken.stability.fisher_sum import FisherSum
from alphatoken.stability.sampling import rollouts, teacher_forced
from tests.fisher_oracle import (
    ExactFisher,
    Squares,
    completions,
    exact_fisher,
    position_gradients,
    squares,
)
from tests.oracle import oracle_copy, relative_error
from tests.test_exact import parameter_names
from tests.tiny import (
    CASES,
    VOCABULARY,
    by_architecture,
    collate,
    random_sequences,
    scored_linears,
)

CPU = torch.device("cpu")
Square = Literal["token", "sequence"]
SQUARES: tuple[Square, ...] = get_args(Square)
WITHOUT_FISHER = r"experts|mlp\.gate\.|conv1d|A_log|dt_bias|linear_attn\.norm"
BATCHES = ([(3, 9), (5, 4), (4, 0)], [(2, 14), (6, 1)])


def built(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = CASES[name].build().to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    if CASES[name].eager_only:
        model.set_attn_implementation("eager")
    return model


def relabelled_batches() -> list[list[tuple[Tensor, Tensor]]]:
    """About half of the labels are not the next token, as if they had been sampled along a given
    response."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for number, lengths in enumerate(BATCHES):
        batch = []
        for ids, labels in random_sequences(lengths, seed=number):
            other = torch.randint(0, VOCABULARY, labels.shape, generator=generator)
            replaced = (torch.rand(labels.shape, generator=generator) < 0.5) & (labels != -100)
            batch.append((ids, torch.where(replaced, other, labels)))
        batches.append(batch)
    return batches


@cache
def expected_squares(name: str) -> dict[str, Squares]:
    """The oracle's sums over all sequences of the batches."""
    model = built(name)
    names = scored_linears(CASES[name], model, depth=2)
    twin = oracle_copy(model)
    each = [
        squares(twin, names, ids, labels) for batch in relabelled_batches() for ids, labels in batch
    ]
    return {
        name: Squares(
            *(torch.stack(parts).sum(0) for parts in zip(*(one[name] for one in each), strict=True))
        )
        for name in names
    }


def add(total: FisherSum, ids_BT: Tensor, labels_BT: Tensor) -> None:
    total.add(total.forward(ids_BT)[0], make_batch({"input_ids": ids_BT, "labels": labels_BT}))


@pytest.mark.parametrize("name", by_architecture())
def test_the_oracles_sequence_square_is_the_squared_gradient(name: str) -> None:
    model = oracle_copy(CASES[name].build())
    ids, labels = relabelled_batches()[0][0]
    names = list(scored_linears(CASES[name], model, depth=2))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    loss = nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    pairs = squares(model, names, ids, labels)
    for name, gradient in zip(names, gradients, strict=True):
        assert relative_error(pairs[name].sequence, gradient.square()) <= 1e-9, name


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("name", by_architecture())
def test_sums_of_squares_match_the_oracle(name: str, square: Square) -> None:
    model = built(name, torch.float64)  # squares double what rounding there is
    decoder = decoder_of(model)
    expected = expected_squares(name)
    tolerance = (
        1e-4 if name == "qwen3_5" else 1e-5
    )  # its linear attention is float32 in the oracle too
    for chunk_tokens in (16384, 1):
        total = FisherSum(decoder, 2, square, CPU, chunk_tokens=chunk_tokens)
        for sequences in relabelled_batches():
            batch = collate(sequences)
            add(total, batch["input_ids"], batch["labels"])
        assert total.slices.keys() == expected.keys()
        for linear, pair in expected.items():
            actual = total.slices[linear].view(model.get_parameter(linear).shape)
            error = relative_error(actual, getattr(pair, square))
            assert error <= tolerance, (
                f"{linear} is off by {error:.1e} with chunk_tokens={chunk_tokens}"
            )

        before = {linear: own.clone() for linear, own in total.slices.items()}
        add(total, batch["input_ids"], torch.full_like(batch["labels"], -100))
        assert all(torch.equal(own, before[linear]) for linear, own in total.slices.items())


@pytest.mark.parametrize(("depth", "chosen"), [(None, "all"), (2, "all"), (2, "norms")])
@pytest.mark.parametrize("name", by_architecture())
def test_norms_embeddings_and_heads_match_the_oracle(
    name: str, depth: int | None, chosen: ParameterSet
) -> None:
    """Every parameter that has a Fisher, in both squares, from gradients position by position."""
    model = built(name, torch.float64)
    decoder = decoder_of(model)
    batch = relabelled_batches()[0]
    every_depth = len(decoder.layers) if depth is None else depth
    totals = {
        square: FisherSum(decoder, every_depth, square, CPU, parameters=chosen)
        for square in SQUARES
    }
    names = list(totals["token"].parameters)
    expected_names = parameter_names(CASES[name], model, every_depth, chosen)
    assert set(names) == {each for each in expected_names if not re.search(WITHOUT_FISHER, each)}
    twin = oracle_copy(model)
    expected = {each: Squares(torch.zeros(()), torch.zeros(())) for each in names}
    for ids, labels in batch:
        for each, gradients in position_gradients(
            twin, names, ids, labels, CASES[name].head_first
        ).items():
            stacked = torch.stack(gradients)
            own = Squares(stacked.square().sum(0), stacked.sum(0).square())
            expected[each] = Squares(*(a + b for a, b in zip(expected[each], own, strict=True)))
    together = collate(batch)
    for square, total in totals.items():
        add(total, together["input_ids"], together["labels"])
        for each in names:
            actual = total.slices[each].view(model.get_parameter(each).shape)
            error = relative_error(actual, getattr(expected[each], square))
            # Norms, rotations and linear attention are float32 in the oracle too, and squares
            # double that.
            assert error <= (1e-4 if name == "qwen3_5" else 2e-5), (
                f"{square} of {each} is off by {error:.1e}"
            )


@pytest.mark.parametrize("square", SQUARES)
def test_squaring_leaves_the_signals_as_they_were(
    monkeypatch: pytest.MonkeyPatch, square: Square
) -> None:
    """Linears that share an input are handed the same tensor."""
    torch.manual_seed(0)
    outgrad_BTO, act_BTI = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    totals = []
    for block in (2**22, 3):
        monkeypatch.setattr(square_rules, "SQUARE_BLOCK_ELEMENTS", block)
        before = outgrad_BTO.clone(), act_BTI.clone()
        totals.append(torch.ones(4, 3))
        square_rules.add_linear_square(totals[-1], outgrad_BTO, act_BTI, square)
        assert outgrad_BTO.equal(before[0])
        assert act_BTI.equal(before[1])
    outer_BTOI = outgrad_BTO[..., None] * act_BTI[:, :, None]
    parts = (
        outer_BTOI.square().sum((0, 1)) if square == "token" else outer_BTOI.sum(1).square().sum(0)
    )
    assert all(torch.allclose(total, 1 + parts, rtol=1e-5) for total in totals)


# A model small enough that all its completions can be enumerated: 85 of each prompt.
PROMPTS = [torch.tensor([1, 2]), torch.tensor([3, 0, 2])]
NEW_TOKENS, STOP, PAD = 3, 4, 0  # the padding token is an ordinary token too
DRAWS = 4000


def five_token_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": STOP}
    config = LlamaConfig(
        **sizes, **heads, **tokens, initializer_range=0.3, max_position_embeddings=16
    )
    return LlamaForCausalLM(config).eval()


class Sampled:
    """The exact Fisher, and its estimates from one set of samples spread evenly over the
    prompts."""

    def __init__(self) -> None:
        self.model = five_token_llama()
        self.names = list(scored_linears(CASES["llama"], self.model, depth=2))
        self.exact: ExactFisher = exact_fisher(self.model, self.names, PROMPTS, NEW_TOKENS, [STOP])
        decoder = decoder_of(self.model)
        totals = {square: FisherSum(decoder, 2, square, CPU) for square in SQUARES}
        self.counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in PROMPTS]
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            prompts = PROMPTS * (DRAWS // 4 // len(PROMPTS))
            uniform_BN = torch.rand(len(prompts), NEW_TOKENS, generator=generator)
            batch = rollouts(decoder, prompts, uniform_BN, [STOP], PAD)
            for number, labels in enumerate(batch["labels"]):
                self.counts[number % len(PROMPTS)][tuple(labels[labels != -100].tolist())] += 1
            for total in totals.values():
                add(total, batch["input_ids"], batch["labels"])
        self.estimate = {
            square: {name: total.slices[name].double() / DRAWS for name in self.names}
            for square, total in totals.items()
        }

    def errors(self, estimate: Square, expected: Square) -> Tensor:
        """Differences of all elements over their standard errors."""
        scores = []
        for name in self.names:
            mean = getattr(self.exact.mean[name], expected).flatten()
            deviation = (getattr(self.exact.variance[name], expected).flatten() / DRAWS).sqrt()
            assert (deviation > 1e-9 * mean.max()).all(), (
                "where nothing varies there is no standard error"
            )
            scores.append((self.estimate[estimate][name] - mean) / deviation)
        return torch.cat(scores)


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return Sampled()


@pytest.mark.parametrize("square", SQUARES)
def test_the_estimate_converges_to_the_exact_fisher(sampled: Sampled, square: Square) -> None:
    """Elements are strongly correlated, so that their root mean square varies by about 0.15 from
    seed to seed."""
    scores = sampled.errors(square, square)
    assert scores.abs().max() <= 5
    assert scores.square().mean().sqrt() <= 1.5
    other: Square = "sequence" if square == "token" else "token"
    wrong = sampled.errors(square, other)
    assert wrong.abs().max() > 50, (
        "the squares are so close to each other that this test cannot fail"
    )
    assert wrong.square().mean().sqrt() > 5


def test_both_squares_have_one_expectation_where_positions_do_not_mix(sampled: Sampled) -> None:
    """Past the last attention, position t sees only its own loss, and those gradients are
    uncorrelated."""
    own = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for path in own:
        pair = sampled.exact.mean[f"model.layers.1.{path}.weight"]
        assert relative_error(pair.token, pair.sequence) <= 1e-6, path
    mixed = sampled.exact.mean["model.layers.1.self_attn.v_proj.weight"]
    assert relative_error(mixed.token, mixed.sequence) > 0.1


def pearson(
    counts: Counter[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]
) -> tuple[float, int]:
    """The chi-square statistic and its degrees of freedom; completions expected fewer than 5 times
    are pooled."""
    draws = sum(counts.values())
    rare = {
        completion for completion, probability in probabilities.items() if draws * probability < 5
    }
    cells = [(counts[each], draws * probabilities[each]) for each in probabilities.keys() - rare]
    cells.append(
        (sum(counts[each] for each in rare), sum(draws * probabilities[each] for each in rare))
    )
    return sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1


def test_completions_come_as_often_as_the_model_says(sampled: Sampled) -> None:
    twin = oracle_copy(sampled.model)
    exact = [dict(completions(twin, prompt, NEW_TOKENS, [STOP])) for prompt in PROMPTS]
    for number, counts in enumerate(sampled.counts):
        assert counts.keys() <= exact[number].keys()
        statistic, freedom = pearson(counts, exact[number])
        assert freedom > 20
        assert abs(statistic - freedom) <= 4 * (2 * freedom) ** 0.5
        assert pearson(counts, exact[1 - number])[0] > 10 * freedom, (
            "the prompts are too alike for this test to fail"
        )


@torch.no_grad()
def drawn_completion(
    model: PreTrainedModel, prompt: Tensor, uniform: Tensor, stop_tokens: Collection[int]
) -> Tensor:
    """One token after the other, each from a pass over the whole sequence."""
    ids = prompt
    for number in uniform.tolist():
        probabilities = torch.softmax(
            model(input_ids=ids[None], use_cache=False).logits[0, -1].double(), dim=-1
        )
        token, reached = 0, float(probabilities[0])
        while reached <= number:
            token += 1
            reached += float(probabilities[token])
        ids = torch.cat([ids, torch.tensor([token])])
        if token in stop_tokens:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", by_architecture())
def test_a_completion_depends_on_its_prompt_and_its_numbers_only(name: str) -> None:
    model = built(name)
    decoder = decoder_of(model)
    stop_tokens = list(range(25))  # the padding token among them
    lengths = [2, 9, 5, 1, 7, 4, 3, 8]
    prompts = [ids for ids, _ in random_sequences([(length, 0) for length in lengths], seed=4)]
    uniform_BN = torch.rand(len(prompts), 6, generator=torch.Generator().manual_seed(6))
    expected = [
        drawn_completion(model, *row, stop_tokens) for row in zip(prompts, uniform_BN, strict=True)
    ]
    assert len({len(completion) for completion in expected}) > 2, (
        "completions should end at different places"
    )

    batch = rollouts(decoder, prompts, uniform_BN, stop_tokens, pad_token=0)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].shape[1] == max(
        len(p) + len(c) for p, c in zip(prompts, expected, strict=True)
    )
    for row, (prompt, completion) in enumerate(zip(prompts, expected, strict=True)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        end = len(prompt) + len(completion)
        assert ids[: len(prompt)].equal(prompt)
        assert ids[len(prompt) : end].equal(completion)
        assert (ids[end:] == 0).all()
        assert (labels[: len(prompt)] == -100).all()
        assert labels[len(prompt) : end].equal(completion)
        assert (labels[end:] == -100).all()
        assert not torch.isin(completion[:-1], torch.tensor(stop_tokens)).any()

        alone = rollouts(decoder, [prompt], uniform_BN[row : row + 1], stop_tokens, pad_token=0)
        assert alone["input_ids"][0].equal(ids[:end])
        assert alone["labels"][0].equal(labels[:end])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.1},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 40))},
        {"min_new_tokens": 12},
        {"num_beams": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_own_generation_settings_do_not_change_the_samples(
    settings: dict[str, object],
) -> None:
    """`generation_config.json` of many chat models has a repetition penalty or cuts the
    distribution's tail."""
    model = built("llama")
    prompts = [ids for ids, _ in random_sequences([(9, 0), (5, 0), (7, 0)], seed=4)]
    uniform_BN = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(6))
    stop_tokens = list(range(8))
    plain = rollouts(decoder_of(model), prompts, uniform_BN, stop_tokens, pad_token=0)
    for setting, value in settings.items():
        setattr(model.generation_config, setting, value)
    changed = rollouts(decoder_of(model), prompts, uniform_BN, stop_tokens, pad_token=0)
    assert changed["labels"].equal(plain["labels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_impossible_is_never_drawn(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_RV = 5 * torch.randn(400, 37, generator=generator)
    logits_RV[torch.rand(logits_RV.shape, generator=generator) < 0.5] = -torch.inf
    logits_RV[:100, :5] = logits_RV[100:200, -5:] = -torch.inf
    logits_RV[:, 17] = 0.0
    below_one = 1 - torch.finfo(dtype).eps / 2
    for uniform_R in (
        torch.zeros(400, dtype=dtype),
        torch.full((400,), below_one, dtype=dtype),
        torch.rand(400, generator=generator, dtype=dtype),
    ):
        assert (uniform_R < 1).all()
        token_R = draw_tokens(logits_RV, uniform_R)
        assert logits_RV.gather(1, token_R[:, None]).isfinite().all()
    first_R = logits_RV.isfinite().long().argmax(dim=1)
    assert draw_tokens(logits_RV, torch.zeros(400, dtype=dtype)).equal(first_R)


def test_evenly_spaced_numbers_draw_each_token_in_proportion() -> None:
    logits_V = 2 * torch.randn(9, generator=torch.Generator().manual_seed(0))
    count = 10_000
    uniform_R = (torch.arange(count) + 0.5) / count
    token_R = draw_tokens(logits_V.expand(count, -1), uniform_R)
    assert (token_R.diff() >= 0).all()
    expected_V = count * torch.softmax(logits_V, dim=-1)
    assert (token_R.bincount(minlength=9) - expected_V).abs().max() <= 1.01


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
def test_samples_in_blocks_are_the_same(
    monkeypatch: pytest.MonkeyPatch, rows_per_block: int, bias: bool, softcap: float | None
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 13, bias=bias)
    hidden_RH, uniform_R = 3 * torch.randn(50, 6), torch.rand(50)
    logits_RV = head(hidden_RH).detach()
    expected = draw_tokens(
        logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap), uniform_R
    )
    monkeypatch.setattr(head_module, "LOGIT_BLOCK_ELEMENTS", 2 * rows_per_block * 13)
    assert head_samples(hidden_RH, head, uniform_R, softcap).equal(expected)
    assert head_samples(hidden_RH[:0], head, uniform_R[:0], softcap).shape == (0,)


def test_teacher_forced_labels_are_drawn_where_the_response_is_predicted() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 13)
    hidden_BTH, uniform_BT = 3 * torch.randn(2, 5, 6), torch.rand(2, 5)
    labels_BT = torch.tensor([[-100, -100, 5, -100, 6], [7, 1, -100, 8, -100]])
    batch = make_batch({"input_ids": torch.zeros_like(labels_BT), "labels": labels_BT})
    sampled_BT = teacher_forced(batch, hidden_BTH, head, uniform_BT, None)["labels"]
    for row in range(2):
        assert sampled_BT[row, 0] == -100, "nothing predicts the first token"
        for t in range(4):
            expected = draw_tokens(head(hidden_BTH[row, t : t + 1]), uniform_BT[row, t : t + 1])
            assert sampled_BT[row, t + 1] == (-100 if labels_BT[row, t + 1] == -100 else expected)
