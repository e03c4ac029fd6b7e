"""Values on a GPU: those of the oracle, of other kernels and of other precisions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as dispatch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alphatoken import TokenValues, ValuationConfig, score_tokens
from alphatoken.passes.attention import AttentionCall, Visibility, log_sum_exp
from alphatoken.passes.forward_mode import check_forward_mode
from alphatoken.training.moments import rank_correlation
from alphatoken.values.algebra import bilinear_product, target_matrix
from tests import test_exact, test_valuation
from tests.flash_attention import stand_in
from tests.gpu.conftest import Note
from tests.oracle import relative_error
from tests.test_forward_mode import saved_config
from tests.tiny import CASES, by_architecture, collate, pack, random_sequences, unpad

EVERYTHING: dict[str, Any] = {
    "estimator": "exact",
    "layers": "all",
    "parameters": "all",
    "stability_weight": 0.0,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "ghost": {"window": 8, "stability_weight": 0.0},
    "exact": EVERYTHING,
}
LENGTHS = [(6, 40), (9, 33), (4, 47), (12, 21)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", by_architecture())
def test_ghost_is_that_of_the_oracle(name: str, device: torch.device) -> None:
    """In float32, which torch multiplies without TF32 unless it is told to."""
    setting = test_valuation.Setting(CASES[name], window=4)
    setting.model.to(device)
    values = setting.score(collate(setting.sequences), collate(setting.validation))
    found = {term: getattr(values, term).cpu() for term in test_valuation.TERMS}
    setting.check({term: unpad(each, setting.sequences) for term, each in found.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", by_architecture())
def test_exact_is_that_of_the_oracle(name: str, device: torch.device) -> None:
    setting = test_exact.Setting(name, None, "all")
    setting.model.to(device)
    values = setting.score(collate(setting.sequences), collate(setting.validation))
    rows_of = partial(unpad, sequences=setting.sequences)
    setting.check(lambda value_BT: rows_of(value_BT.cpu()), values, str(device))


def model_of_16(**sizes: Any) -> PreTrainedModel:
    """A random Llama whose heads have the size of 16 that flash attention takes."""
    torch.manual_seed(0)
    shared = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**shared, **heads, pad_token_id=0, **sizes)).eval()


def values_of(
    model: PreTrainedModel, estimator: str, *, packed: bool = False
) -> tuple[Tensor, TokenValues]:
    """Values of four sequences by four others, and where they are of responses."""
    sequences, held_out = (random_sequences(LENGTHS, seed) for seed in (1, 2))
    batch = pack(sequences, 1) if packed else collate(sequences)
    validation = pack(held_out, 1) if packed else collate(held_out)
    config = ValuationConfig.model_validate({"layers": 2, **ESTIMATORS[estimator]})
    values = score_tokens(model, batch, validation, config=config)
    response_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    response_BT[:, :-1] = batch["labels"][:, 1:] != -100
    return response_BT, values


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bf16_ranks_tokens_like_float32(estimator: str, device: torch.device, note: Note) -> None:
    model = model_of_16().to(device)
    response_BT, precise = values_of(model, estimator)
    _, coarse = values_of(model.bfloat16(), estimator)
    own = response_BT.to(precise.composite.device)
    found = rank_correlation(precise.composite[own], coarse.composite[own])
    note(f"rank correlation {found:.4f}")
    assert found >= 0.99


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_flash_attention_gives_the_values_of_sdpa(
    estimator: str, version: int, packed: bool, device: torch.device, note: Note
) -> None:
    """The kernel in bf16, where its package is installed; on a CPU its stand-in in float32. No
    other name than the kernel's is ever loaded."""
    name = f"flash_attention_{version}"
    if device.type == "cpu":
        with stand_in(version) as calls:
            found = values_with(name, estimator, torch.float32, device, packed=packed)
        assert calls
    else:
        pytest.importorskip("flash_attn" if version == 2 else "flash_attn_interface")
        found = values_with(name, estimator, torch.bfloat16, device, packed=packed)
    response_BT, flash = found
    own = response_BT.to(flash.device)
    _, precise = values_with("sdpa", estimator, torch.float32, device, packed=packed)
    if device.type == "cpu":
        assert relative_error(flash[own], precise[own]) <= 1e-4
        return
    _, sdpa = values_with("sdpa", estimator, torch.bfloat16, device, packed=packed)
    found_by = {"flash": flash, "sdpa": sdpa}
    off = {key: relative_error(each[own], precise[own]) for key, each in found_by.items()}
    note(", ".join(f"{key} off by {error:.1e} from float32" for key, error in off.items()))
    assert rank_correlation(flash[own], precise[own]) >= 0.99
    assert off["flash"] <= 3 * off["sdpa"] + 1e-3


def values_with(
    attention: str, estimator: str, dtype: torch.dtype, device: torch.device, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """Where values are of responses, and the composite; every kernel that `transformers` was asked
    for must be `attention`."""
    model = model_of_16().to(device=device, dtype=dtype)
    model.set_attn_implementation(attention)
    asked: list[Any] = []
    load = vars(dispatch)["_lazy_imports"]

    def spy(implementation: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(implementation)
        return load(implementation, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "_lazy_imports", spy)
        response_BT, values = values_of(model, estimator, packed=packed)
    assert set(asked) <= {attention}
    return response_BT, values.composite


def qkv(
    device: torch.device, dtype: torch.dtype, length: int = 192
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(2, 4, length, 64, generator=generator) for _ in range(3))
    query, key, value = (each.to(device, dtype) for each in made)
    return query, key, value


def kernels_of(device: torch.device) -> dict[str, Any]:
    """Attention kernels that return the log-sum-exp of every query beside their output."""

    def aten(name: str) -> Any:
        return getattr(torch.ops.aten, f"_scaled_dot_product_{name}")

    if device.type == "cpu":
        return {"flash": partial(aten("flash_attention_for_cpu"), is_causal=True)}
    with_log_sum_exp = {
        "attn_bias": None,
        "compute_log_sumexp": True,
        "dropout_p": 0.0,
        "is_causal": True,
    }
    return {
        "flash": partial(aten("flash_attention"), is_causal=True),
        "efficient": partial(aten("efficient_attention"), **with_log_sum_exp),
        "cudnn": partial(aten("cudnn_attention"), **with_log_sum_exp),
    }


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_a_kernels_log_sum_exp_is_that_of_blocks(kernel: str, device: torch.device) -> None:
    kernels = kernels_of(device)
    if kernel not in kernels:
        pytest.skip(f"no {kernel} kernel on {device.type}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = qkv(device, dtype)
    found = kernels[kernel](query, key, value)[1].float()
    expected = log_sum_exp(AttentionCall(query, key, 64**-0.5, Visibility()))
    # Some pad the queries, some append a dimension.
    lse_BHT = found.flatten(2)[..., : expected.shape[-1]]
    assert (lse_BHT - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_sdpa_says_which_kernel_it_runs(packed: bool, device: torch.device, note: Note) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = qkv(device, dtype)
    mask = None
    if packed:
        documents = torch.arange(query.shape[2], device=device) // 50
        mask = (documents[:, None] == documents).tril()[None, None]
    choice = torch._fused_sdp_choice(query, key, value, mask, is_causal=not packed)
    backend = torch.nn.attention.SDPBackend(choice)
    note(f"{backend.name} with {'a mask of documents' if packed else 'the causal rule'}")
    assert packed or backend is not torch.nn.attention.SDPBackend.MATH


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("phi3", "gpt2"))]
)
def test_exact_is_the_difference_quotient(name: str, device: torch.device) -> None:
    """Of token losses in float64, along the gradient of the held-out losses by autograd."""
    model = CASES[name].build().double().to(device)
    sequences, held_out = (random_sequences([(3, 9), (5, 4)], seed) for seed in (1, 2))
    batch, validation = (on_device(collate(each), device) for each in (sequences, held_out))
    config = ValuationConfig.model_validate(EVERYTHING)
    values = score_tokens(model, batch, validation, config=config).composite
    losses, response_BT = token_losses(model, validation)
    mean = losses[response_BT].mean()
    direction = torch.autograd.grad(mean, list(model.parameters()), allow_unused=True)
    _, response_BT = token_losses(model, batch)

    @torch.no_grad()
    def quotient(step: float) -> Tensor:
        moved = []
        for scale in (step, -2 * step, step):  # ahead, behind, and back
            for weight, along in zip(model.parameters(), direction, strict=True):
                if along is not None:
                    weight.add_(along, alpha=scale)
            moved.append(token_losses(model, batch)[0])
        return (moved[0] - moved[1]) / (2 * step)

    # Norms compute in float32, so steps are long, and their error is taken off (Richardson).
    expected = (4 * quotient(5e-4) - quotient(1e-3)) / 3
    assert relative_error(values[:, :-1][response_BT], expected[response_BT]) <= 1e-4


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: each.to(device) for key, each in batch.items()}


def token_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the positions that predict something (B, T - 1), and which of them count."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = ids[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return nll, batch["labels"][:, 1:] != -100


@pytest.mark.gpu
@pytest.mark.parametrize("name", by_architecture())
def test_layers_have_a_forward_derivative(name: str, device: torch.device, tmp_path: Path) -> None:
    """With whatever kernels this machine has installed; on a CPU `tests/test_forward_mode.py`."""
    check_forward_mode(saved_config(name, tmp_path), device)


def test_a_sum_of_outer_products_needs_no_float32_products(
    device: torch.device, note: Note
) -> None:
    """G of bf16 signals, whose products are exact in float32 and in TF32: what is lost is the order
    of sums."""
    generator = torch.Generator().manual_seed(0)
    outgrad_NO, act_NI = (
        torch.randn(512, features, generator=generator).bfloat16().to(device)
        for features in (96, 64)
    )
    exact = outgrad_NO.double().T @ act_NI.double()
    ways = {"float32": target_matrix(outgrad_NO, act_NI)}
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ways["TF32 allowed"] = target_matrix(outgrad_NO, act_NI)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    if device.type == "cuda":
        ways["bf16 to float32"] = torch.mm(outgrad_NO.T, act_NI, out_dtype=torch.float32)
    errors = {way: relative_error(found, exact) for way, found in ways.items()}
    note(", ".join(f"{way} {error:.1e}" for way, error in errors.items()))
    assert max(errors.values()) <= 1e-3
    values = bilinear_product(outgrad_NO, ways["float32"].bfloat16(), act_NI)
    explicit = torch.einsum("no,oi,ni->n", outgrad_NO.double(), exact, act_NI.double())
    assert relative_error(values, explicit) <= 2e-2
