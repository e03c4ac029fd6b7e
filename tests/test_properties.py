"""What the mathematics promises, whatever the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alphatoken import TokenValues, ValuationConfig, score_tokens
from alphatoken.batch import make_batch
from alphatoken.models.decoder import decoder_of
from alphatoken.models.head import head_loss
from alphatoken.passes import chunks
from alphatoken.stability.drift import Drift
from alphatoken.util.products import float32_product, tensor_float_32
from alphatoken.values import algebra
from alphatoken.values.algebra import (
    bilinear_product,
    bilinear_products,
    cheaper_contraction,
    signals_product,
    target_matrix,
)
from alphatoken.values.ghost.directions import Weighted, contractions_with
from alphatoken.values.ghost.held_out import HeldOutSignals
from alphatoken.values.ghost.scorer import GhostScorer
from alphatoken.values.ghost.signals import LinearSignals, SignalConsumer
from alphatoken.values.ghost.tower import Tower
from benchmarks.contraction_cost import apart, layer, together, traffic
from tests.oracle import Sequences, relative_error
from tests.test_valuation import LENGTHS, TERMS, VALIDATION_LENGTHS, Setting, scored_set, stability
from tests.tiny import CASES, by_architecture, collate, random_sequences, tiny_llama, unpad

CPU = torch.device("cpu")


class ContractEverywhere:
    """Sums d_t^T U h_t over every position, prompt included, for fixed matrices U."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        self.matrices = matrices
        self.total = 0.0

    def consumer_of(self, layer: int) -> AbstractContextManager[SignalConsumer]:
        return nullcontext(self.add)

    def add(self, signals: LinearSignals) -> None:
        products = bilinear_product(
            signals.outgrad_BTO.flatten(0, 1),
            self.matrices[signals.linear.name],
            signals.act_BTI.flatten(0, 1),
        )
        self.total += float(products.double().sum())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", by_architecture())
def test_direct_values_of_all_positions_sum_to_the_gradient_product(
    name: str, resident: bool
) -> None:
    """sum_t d_t^T U h_t = <grad L, U> on the scored linears."""
    case = CASES[name]
    model = case.build()
    batch = collate(random_sequences(LENGTHS, seed=1))
    generator = torch.Generator().manual_seed(5)
    linears = scored_set(case, model, depth=3).linears
    matrices = {
        name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in linears
    }

    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in linears])
    expected = sum(
        float((gradient.double() * matrix).sum())
        for gradient, matrix in zip(gradients, matrices.values(), strict=True)
    )

    decoder = decoder_of(model)
    tower = Tower(decoder, 3, CPU, resident=resident, chunk_tokens=30)
    tower.refresh()
    with torch.no_grad(), tower.capture() as capture:
        decoder.hidden_states({"input_ids": batch["input_ids"]})
    oriented = {name: matrix.T if case.transposed else matrix for name, matrix in matrices.items()}
    sums = ContractEverywhere(oriented)
    nll_BT = tower.run(capture.entry, make_batch(batch), sums.consumer_of)
    assert sums.total == pytest.approx(expected, rel=1e-4)
    # `exact` spreads the same sum over the response tokens: with F = 1 and W_ref = W - u the
    # drift is u.
    values = score_tokens(
        model,
        batch,
        batch,
        fisher={name: torch.ones_like(matrix) for name, matrix in matrices.items()},
        reference={
            name: model.get_parameter(name).detach() - matrix for name, matrix in matrices.items()
        },
        config=ValuationConfig(
            estimator="exact", layers=3, residency="resident" if resident else "streamed"
        ),
    )
    assert float(values.direct_proxy.sum()) == pytest.approx(expected, rel=1e-4)
    assert float(nll_BT.sum()) == pytest.approx(float(loss), rel=1e-5)


@st.composite
def masked_sequences(draw: st.DrawFn) -> list[tuple[Tensor, Tensor]]:
    """Rows of any length and any response mask: none, one token, several turns."""
    sequences = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, 15))
        ((ids, labels),) = random_sequences([(0, length)], seed=draw(st.integers(0, 50)) + number)
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        sequences.append((ids, labels.masked_fill(~mask, -100)))
    return sequences


CANCELLING = [
    (torch.tensor([39, 44]), torch.tensor([-100, -100])),
    (torch.tensor([30, 35, 52, 22]), torch.tensor([-100, 35, -100, 22])),
]
"""Two response tokens of which one has a causal effect, whose products nearly cancel: in float32 it
is off by 1e-4."""


@settings(deadline=None, max_examples=40)
@example(
    sequences=CANCELLING,
    window=2,
    chunk_tokens=1000,
    side="left",
    residency="resident",
    contraction="ghost",
)
@given(
    sequences=masked_sequences(),
    window=st.integers(0, 6),
    chunk_tokens=st.sampled_from([1, 20, 1000]),
    side=st.sampled_from(["left", "right"]),
    residency=st.sampled_from(["resident", "streamed"]),
    contraction=st.sampled_from(["ghost", "materialised"]),
)
def test_any_shape_and_mask_matches_the_oracle(
    sequences: Sequences,
    window: int,
    chunk_tokens: int,
    side: str,
    residency: str,
    contraction: str,
) -> None:
    setting = Setting(CASES["llama"], window, sequences)
    values = setting.score(
        collate(sequences, side),
        collate(setting.validation, side),
        chunk_tokens=chunk_tokens,
        residency=residency,
        contraction=contraction,
    )
    found = {term: unpad(getattr(values, term), sequences, side) for term in TERMS}
    setting.check(found, tolerance=5e-4)


class Plain:
    """A Llama with stability tensors; `values` scores a batch by a validation batch."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.fisher, self.reference = stability(
            self.model, list(scored_set(CASES["llama"], self.model, 2).linears)
        )
        self.sequences = random_sequences(LENGTHS, seed=1)
        self.validation = random_sequences(VALIDATION_LENGTHS, seed=2)

    def values(self, batch: dict[str, Tensor], validation: dict[str, Tensor]) -> TokenValues:
        config = ValuationConfig(layers=2, window=4)
        return score_tokens(
            self.model,
            batch,
            validation,
            fisher=self.fisher,
            reference=self.reference,
            config=config,
        )


def test_permuting_the_batch_permutes_the_values() -> None:
    plain = Plain()
    batch, validation = collate(plain.sequences), collate(plain.validation)
    order = torch.tensor([2, 0, 3, 1])
    straight = plain.values(batch, validation)
    permuted = plain.values({key: value[order] for key, value in batch.items()}, validation)
    for term in TERMS:
        assert relative_error(getattr(permuted, term), getattr(straight, term)[order]) <= 1e-6


def test_duplicating_the_validation_set_changes_nothing() -> None:
    plain = Plain()
    batch = collate(plain.sequences)
    once = plain.values(batch, collate(plain.validation))
    twice = plain.values(batch, collate([*plain.validation, *plain.validation]))
    for term in TERMS:
        assert relative_error(getattr(twice, term), getattr(once, term)) <= 1e-6


@pytest.mark.parametrize("contraction", ["ghost", "materialised"])
def test_scaling_the_loss_scales_the_terms(contraction: Literal["ghost", "materialised"]) -> None:
    """Target terms are bilinear in the validation and the training loss, proxy terms linear in the
    training loss."""
    plain = Plain()
    batch, validation = (
        make_batch(collate(plain.sequences)),
        make_batch(collate(plain.validation)),
    )
    decoder = decoder_of(plain.model.eval())
    parameters = {name: plain.model.get_parameter(name) for name in plain.fisher}
    config = ValuationConfig(layers=2, window=4, contraction=contraction)

    def scores(validation_scale: float, training_scale: float) -> TokenValues:
        scorer = GhostScorer(
            decoder, config, CPU, Drift(parameters, plain.fisher, plain.reference, CPU)
        )
        with loss_scaled_by(validation_scale):
            scorer.refresh([validation])
        with torch.no_grad(), scorer.capture() as capture:
            decoder.hidden_states(batch)
        with loss_scaled_by(training_scale):
            return scorer.score(capture.entry, batch).values

    once, scaled = scores(1.0, 1.0), scores(-2.0, 3.0)
    for term, factor in {
        "direct_target": -6,
        "causal_target": -6,
        "direct_proxy": 3,
        "causal_proxy": 3,
    }.items():
        assert relative_error(getattr(scaled, term), factor * getattr(once, term)) <= 1e-5, term


@contextmanager
def loss_scaled_by(factor: float) -> Iterator[None]:
    """Every gradient at the head's input becomes `factor` times as large."""

    def scaled(*arguments: Any) -> tuple[Tensor, Tensor]:
        nll_R, outgrad_RH = head_loss(*arguments)
        return nll_R, factor * outgrad_RH

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "head_loss", scaled)
        yield


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_never_matters(side: str) -> None:
    plain = Plain()
    results = []
    for pad in (0, 9):
        batch, validation = (
            collate(rows, side, pad) for rows in (plain.sequences, plain.validation)
        )
        results.append(plain.values(batch, validation))
    for term in TERMS:
        assert torch.equal(getattr(results[0], term), getattr(results[1], term))


def test_scoring_leaves_the_model_as_it_was() -> None:
    plain = Plain()
    plain.model.train()
    plain.model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    modes = [module.training for module in plain.model.modules()]
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in plain.model.modules()
    )
    plain.values(collate(plain.sequences), collate(plain.validation))
    assert [module.training for module in plain.model.modules()] == modes
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in plain.model.state_dict().items()
    )
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in plain.model.parameters()
    )
    assert hooks == sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in plain.model.modules()
    )
    assert plain.model.config._attn_implementation == "sdpa"


sizes = st.tuples(*[st.integers(1, 9)] * 4)


@settings(deadline=None, max_examples=60)
@given(
    size=sizes, seed=st.integers(0, 20), factor=st.sampled_from([0.5, 3.0]), block=st.integers(1, 9)
)
def test_both_contractions_are_the_same_bilinear_form(
    size: tuple[int, int, int, int], seed: int, factor: float, block: int
) -> None:
    rows, held_out, inputs, outputs = size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    outgrad, act, val_outgrad, val_act = (
        random(rows, outputs),
        random(rows, inputs),
        random(held_out, outputs),
        random(held_out, inputs),
    )
    explicit = torch.stack(
        [
            sum(
                ((outgrad[t] @ val_outgrad[v]) * (act[t] @ val_act[v]) for v in range(held_out)),
                torch.zeros(()),
            )
            / held_out
            for t in range(rows)
        ]
    )
    for choice in ("ghost", "materialised"):
        # Scaling the validation loss scales its gradients, and with them the values.
        features = {"linear": (outputs, inputs)}
        signals = HeldOutSignals(features, choice, torch.float32, CPU)
        signals.begin(held_out, rows)
        for start in range(0, held_out, block):
            signals.add(
                "linear",
                factor * val_outgrad[start : start + block],
                val_act[start : start + block],
            )
        signals.reduce(["linear"])
        direction = {"target": [Weighted(1.0, signals)]}
        found = contractions_with(direction, ["linear"], features, torch.float32)
        contraction = found["target"]["linear"]
        assert torch.allclose(contraction(outgrad, act), factor * explicit, atol=1e-4)
    assert torch.allclose(
        signals_product(outgrad, act, val_outgrad, val_act, held_out, block), explicit, atol=1e-4
    )
    matrix = target_matrix(val_outgrad, val_act) / held_out
    assert torch.allclose(bilinear_product(outgrad, matrix, act), explicit, atol=1e-4)


class LargestResult(TorchDispatchMode):
    """The most elements that an operation gave, of those that are no views of an input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_products_with_matrices_are_those_of_the_equation_and_bounded(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, paths: int, most: int
) -> None:
    """However many rows make a block, and from whichever side the matrix is multiplied."""
    monkeypatch.setattr(algebra, "BLOCK_ELEMENTS", most)
    rows, held_out = 23, 6
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    act_RI, outgrads = random(rows, inputs), [random(rows, outputs) for _ in range(paths)]
    matrices = [random(outputs, inputs) for _ in range(3)]
    val_act_NI, val_outgrad_NO = random(held_out, inputs), random(held_out, outputs)
    with LargestResult() as largest:
        found = bilinear_products(outgrads, matrices, act_RI)
        ghost_R = signals_product(outgrads[0], act_RI, val_outgrad_NO, val_act_NI, held_out)
    for matrix_OI, by_outgrad in zip(matrices, found, strict=True):
        for outgrad_RO, product_R in zip(outgrads, by_outgrad, strict=True):
            expected_R = torch.einsum("ro,oi,ri->r", outgrad_RO, matrix_OI, act_RI)
            torch.testing.assert_close(product_R, expected_R, rtol=1e-5, atol=1e-5)
    mean_OI = val_outgrad_NO.T @ val_act_NI / held_out
    expected_R = torch.einsum("ro,oi,ri->r", outgrads[0], mean_OI, act_RI)
    torch.testing.assert_close(ghost_R, expected_R, rtol=1e-5, atol=1e-5)
    assert largest.elements <= max(most, inputs, outputs, rows)


def test_products_that_are_taken_together_move_half_the_bytes() -> None:
    """Of a Llama layer's linears in bfloat16, with G and V: 175 MB instead of 374 of a full one."""
    linears = layer(256, 512, torch.bfloat16, CPU)
    assert traffic(lambda: together(linears)) <= 0.55 * traffic(lambda: apart(linears))


def test_the_drift_is_rounded_before_it_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of it is then half as long."""
    weight = torch.nn.Parameter(torch.randn(3, 2))
    drift = Drift({"w": weight}, {"w": torch.ones(3, 2)}, {"w": torch.zeros(3, 2)}, CPU)
    sent: list[Tensor] = []

    def gather(slices: list[Tensor], parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        sent.extend(slices)
        return slices

    monkeypatch.setattr("alphatoken.distributed.zero3.whole_tensors", gather)
    drift.matrices(["w"], torch.bfloat16)
    assert [each.dtype for each in sent] == [torch.bfloat16]
    assert torch.equal(sent[0].view(3, 2), weight.detach().bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_float32_are_of_the_numbers_given(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 40).to(dtype), torch.randn(40, 3).to(dtype)
    expected = left.double() @ right.double()
    found = float32_product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_tf32_is_left_as_it_was() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision

    @tensor_float_32()
    def fails() -> None:
        assert settings.fp32_precision == "tf32"
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert settings.fp32_precision == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_of_16_bits_are_as_good_in_tf32() -> None:
    left, right = torch.randn(2, 8192, 256, device="cuda").to(torch.bfloat16)
    found, expected = float32_product(left.T, right), left.double().T @ right.double()
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-3


def test_the_cost_model_breaks_even_where_it_says() -> None:
    """In one process with many scored tokens: N = I O / (I + O). Few tokens do not repay
    forming G."""
    break_even = 576 * 1536 / (576 + 1536)
    for count, expected in ((int(break_even) - 5, "signals"), (int(break_even) + 5, "matrix")):
        assert cheaper_contraction(count, 10**7, 576, 1536, ranks=1) == expected
    assert cheaper_contraction(1000, 10, 576, 1536, ranks=1) == "signals"
    # Over many ranks, moving a few rows is cheaper than moving a matrix, and a matrix cheaper
    # than very many rows.
    assert cheaper_contraction(300, 100, 4096, 4096, ranks=64) == "signals"
    assert cheaper_contraction(100_000, 100, 4096, 4096, ranks=64) == "matrix"
