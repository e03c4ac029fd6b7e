"""What training, scoring and their parts take on one GPU, with the shapes of Llama-3.1-8B and
random weights: nothing is downloaded.

    python -m benchmarks.gpu --output FILE.json

A. a micro-batch of 8k tokens, trained on all tokens (`plain`) or scored first, with every attention
   kernel that is installed; the model has 4 layers, and times are also scaled to 32. `exact` runs
   attention of its own, so it is measured beside one kernel.
B. the refresh and its parts; G in several precisions.
C. what scoring does about attention itself, by length.
D. head, contractions, copies of weights, and a profiler's trace of a step beside FILE.json.

Each case is the median of 10 calls after 3, and is written when it is done; one that fails, or has
not the memory, is written with its error, and the next one is measured. `--device cpu` runs every
line with small shapes, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alphatoken.cli import readable_errors
from alphatoken.config.valuation import ValuationConfig
from alphatoken.distributed import zero3
from alphatoken.errors import UserError
from alphatoken.models.decoder import decoder_of
from alphatoken.models.head import head_loss, head_nll
from alphatoken.models.scored import scored_depth
from alphatoken.passes.attention import (
    AttentionCall,
    Visibility,
    attention_band,
    log_sum_exp,
)
from alphatoken.passes.blocked_attention import blocked_attention
from alphatoken.stability.drift import Drift
from alphatoken.training.trainer import Trainer
from alphatoken.values.algebra import bilinear_product, signals_product, target_matrix
from alphatoken.values.estimator import Scorer
from alphatoken.values.registry import build_scorer
from benchmarks.measuring import (
    Peak,
    build_trainer,
    circumstances,
    flops,
    seconds,
    write_result,
)
from recipes.quickstart.get_model import save_tiny

SHAPES = Path(__file__).parent.parent / "tests" / "models" / "llama-3.1-8b" / "config.json"
LAYERS, WHOLE = 4, 32
WINDOW = 32
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    model: dict[str, Any]
    """What is different from the shapes of the 8B model."""
    row_tokens: int
    lengths: tuple[int, ...]
    held_out: int
    calls: int
    warm_up: int


SCALES = {
    "cuda": Scale({}, 4096, (4096, 8192, 16384, 32768), 8, calls=10, warm_up=3),
    "cpu": Scale(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        192,
        (64, 128),
        2,
        calls=2,
        warm_up=1,
    ),
}


class Results:
    """Measures cases and writes them as they come."""

    def __init__(
        self, file: Path | None, about: dict[str, Any], scale: Scale, device: torch.device
    ):
        self._file = file
        self._about = about
        self._scale = scale
        self.device = device
        self.cases: dict[str, dict[str, Any]] = {}
        self._peak = Peak(device)

    def measure(
        self, name: str, call: Callable[[], object], *, moved: int = 0, **known: float
    ) -> float | None:
        """Seconds of a call, None where it failed. moved: bytes that it has to read and write at
        least; `known` goes into the result as it is."""

        def work() -> dict[str, Any]:
            for _ in range(self._scale.warm_up):
                call()
            times = [seconds(call, self.device) for _ in range(self._scale.calls)]
            median = statistics.median(times)
            operations = flops(call)
            found = {"seconds": median, "all_seconds": times, **known}
            if operations:
                found["tflops"] = operations / median / 1e12
            if moved:
                found["gigabytes_per_second"] = moved / median / 1e9
            return {**found, "peak_bytes_above_resident": self._peak.of(call)}

        return self.record(name, work).get("seconds")

    def record(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` returns, or its error."""
        began = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # whatever it is, the other cases are wanted
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        self.cases[name] = {**found, "seconds_of_case": time.perf_counter() - began}
        self._write()
        return found

    def leave_out(self, name: str, reason: str) -> None:
        """Says of a case why it is not measured."""
        self.cases[name] = {"left_out": reason}
        self._write()

    def add(self, name: str, **found: float) -> None:
        """More about a case that was measured."""
        self.cases[name] |= found
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            write_result({**self._about, "cases": self.cases}, self._file)


def save_model(folder: Path, scale: Scale, device: torch.device) -> None:
    """A random model of the 8B shapes with few layers, in bf16, and the tokenizer of bytes."""
    save_tiny(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = json.loads(SHAPES.read_text(encoding="utf-8"))
    config = LlamaConfig(**{**settings, **scale.model, **ids, "num_hidden_layers": LAYERS})
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)


def save_rows(file: Path, row_tokens: int) -> None:
    """Rows of nearly as many tokens, which are bytes: the rest is the template's and the prompt."""
    response = "a" * (row_tokens - 48)
    rows = [{"prompt": f"row {number:03}", "response": response} for number in range(200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Run:
    """A trainer whose scorer is changed from case to case."""

    def __init__(self, trainer: Trainer, held_out: int) -> None:
        run = trainer.run
        self.device, self.engine, self.model = run.device, run.engine, run.model
        self.decoder = decoder_of(self.model.lm)
        (self._valued,) = self.model.selections
        self.batch = trainer.feed.training(0).batches[0]
        self.held_out = trainer.feed.first_held_out(held_out)
        self.plain()

    def scorer(self, *, directions: int = 1, **values: Any) -> Scorer:
        """A refreshed scorer. With two directions G and V are told apart, with V of ones."""
        config = ValuationConfig.model_validate({"split_terms": directions == 2, **values})
        drift = None
        if directions == 2:
            depth = scored_depth(config.layers, len(self.decoder.layers))
            stable = self.decoder.stable_parameters(depth, config.parameters)
            ones = {
                name: torch.ones(1).expand(zero3.full_shape(each)) for name, each in stable.items()
            }
            drift = Drift(stable, ones, None, self.device)
        found = build_scorer(self.decoder, config, self.device, drift)
        self.model.attach(found)
        found.refresh(self.held_out, int(self.batch["response"].sum()))
        return found

    def valued(self, scorer: Scorer) -> None:
        """Half of the tokens are trained on from here on."""
        self.model.attach(scorer)
        self.model.selections = (self._valued,)

    def plain(self) -> None:
        """All of them are, and none is scored."""
        self.model.attach(None)
        self.model.selections = (replace(self._valued, policy="all"),)

    def train(self) -> None:
        total = self.engine(self.batch)["total"]
        self.engine.backward(total / 1000, scale_wrt_gas=False)


@contextmanager
def built(arguments: argparse.Namespace, kernel: str, *, packed: bool) -> Iterator[Run]:
    """A run with a kernel of attention, on rows, or on twice as many of half the length packed."""
    chosen = argparse.Namespace(**vars(arguments))
    if packed:
        chosen.data, chosen.micro_batch = arguments.short_data, 2 * arguments.micro_batch
    with tempfile.TemporaryDirectory() as folder:
        sections: dict[str, dict[str, Any]] = {
            "model": {"attn_implementation": kernel},
            "data": {"packing": packed},
        }
        trainer = build_trainer(chosen, folder, sections)
        try:
            yield Run(trainer, arguments.scale.held_out)
        finally:
            trainer.run.engine.destroy()


def micro_batches(results: Results, arguments: argparse.Namespace) -> None:
    """Case A, and with the first kernel B and the trace."""
    for kernel, packed in (
        ("sdpa", False),
        ("flash_attention_2", False),
        ("flash_attention_3", False),
        ("sdpa", True),
        ("flash_attention_2", True),
        ("flash_attention_3", True),
    ):
        about = f"{kernel}, packed" if packed else kernel
        package = FLASH.get(kernel)
        if package is not None and (results.device.type != "cuda" or find_spec(package) is None):
            reason = "no CUDA device" if results.device.type != "cuda" else f"no package {package}"
            results.leave_out(f"A {about}", reason)
            continue

        case = partial(one_kernel, results, arguments, kernel, about=about, packed=packed)
        results.record(f"A {about}", case)


def one_kernel(
    results: Results, arguments: argparse.Namespace, kernel: str, *, about: str, packed: bool
) -> dict[str, Any]:
    with built(arguments, kernel, packed=packed) as run:
        plain = results.measure(f"A {about}: plain", run.train)
        head = results.measure(f"A {about}: head alone", partial(head_alone, run))
        if plain is not None and head is not None:
            # Layers are alike, and their number changes nothing else.
            whole = head + WHOLE * (plain - head) / LAYERS
            results.add(f"A {about}: plain", seconds_of_32_layers=whole)
            ghost_beside(results, run, about, plain=plain, whole=whole)
            if about == "sdpa":
                exact_beside(results, run, about, plain=plain, whole=whole)
        if about == "sdpa":
            refreshes(results, run)
            step_trace(results, run, arguments.output)
        return {"tokens": run.batch["input_ids"].numel()}


def ghost_beside(results: Results, run: Run, about: str, *, plain: float, whole: float) -> None:
    """`ghost` on the last 3 layers, however many there are."""
    name = f"A {about}: ghost, 3 layers"
    found = scored(results, run, name, layers=3, window=WINDOW, stability_weight=0.0)
    if found is not None:
        more = found - plain
        results.add(name, over_plain=found / plain, over_plain_of_32=(whole + more) / whole)


def exact_beside(results: Results, run: Run, about: str, *, plain: float, whole: float) -> None:
    """`exact` on the last two layers, and on the last one: what a layer takes is the difference."""
    for directions in (1, 2):
        more = {}
        for layers in (1, 2):
            name = f"A {about}: exact, {layers} of {LAYERS} layers, directions: {directions}"
            weight = 0.0 if directions == 1 else 1.0
            values = {"estimator": "exact", "layers": layers, "stability_weight": weight}
            found = scored(results, run, name, directions=directions, **values)
            if found is not None:
                more[layers] = found - plain
                results.add(name, over_plain=found / plain)
        if len(more) == 2:
            half = more[1] + (WHOLE // 2 - 1) * (more[2] - more[1])
            results.add(name, over_plain_of_32=(whole + half) / whole)


def scored(results: Results, run: Run, name: str, **values: Any) -> float | None:
    """Seconds of a micro-batch that is scored first; None where that failed."""
    try:
        run.valued(run.scorer(**values))
    except Exception as error:  # such as too little memory
        results.record(name, partial(raise_again, error))
        return None
    try:
        return results.measure(name, run.train)
    finally:
        run.plain()


def raise_again(error: Exception) -> dict[str, Any]:
    raise error


def head_alone(run: Run) -> None:
    """The head's part of a plain micro-batch, forward and backward."""
    weight = run.decoder.head.weight
    rows = int(run.batch["response"].sum())
    (whole,) = zero3.full_weights([weight], run.device)
    hidden = torch.ones(rows, whole.shape[1], dtype=whole.dtype, device=run.device)
    targets = torch.zeros(rows, dtype=torch.int64, device=run.device)
    leaves = [hidden.requires_grad_(), whole.detach().requires_grad_()]
    nll_R = head_nll(leaves[0], leaves[1], None, targets, None)
    torch.autograd.grad(nll_R.sum(), leaves)


def refreshes(results: Results, run: Run) -> None:
    """Case B: the parts that can be called alone; the tower with its products is the rest."""
    scorer = run.scorer(layers=3, window=WINDOW, stability_weight=0.0)
    tokens = int(run.batch["response"].sum())

    def forward() -> None:
        for batch in run.held_out:
            scorer.run_body(batch)

    whole = results.measure("B refresh", partial(scorer.refresh, run.held_out, tokens))
    body = results.measure("B forward of the held-out rows", forward)
    weights = results.measure("B weights of the tower", partial(scorer.refresh, None))
    if whole is not None and body is not None and weights is not None:
        results.add("B refresh", seconds_of_tower_and_products=whole - body - weights)
    run.plain()


def step_trace(results: Results, run: Run, output: Path | None) -> None:
    """A profiler's trace of a valued micro-batch, for chrome://tracing."""
    file = Path(os.devnull) if output is None else output.with_suffix(".trace.json")
    run.valued(run.scorer(layers=3, window=WINDOW, stability_weight=0.0))

    def work() -> dict[str, Any]:
        activities = [ProfilerActivity.CPU]
        if results.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiled:
            run.train()
        profiled.export_chrome_trace(str(file))
        return {"file": file.name}

    results.record("D trace of a valued micro-batch", work)
    run.plain()


def products_of_g(results: Results, scale: Scale) -> None:
    """Case B: one G of an MLP, of 8k signals."""
    config = json.loads(SHAPES.read_text(encoding="utf-8")) | scale.model
    count, device = 2 * scale.row_tokens, results.device
    outgrad_NO = torch.randn(count, config["intermediate_size"], device=device).bfloat16()
    act_NI = torch.randn(count, config["hidden_size"], device=device).bfloat16()

    def with_tf32() -> None:
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            target_matrix(outgrad_NO, act_NI)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed

    results.measure("B G as it is formed", partial(target_matrix, outgrad_NO, act_NI))
    results.measure("B G, TF32 allowed", with_tf32)
    if device.type == "cuda":
        product = partial(torch.mm, outgrad_NO.T, act_NI, out_dtype=torch.float32)
        results.measure("B G, bf16 product with float32 sums", product)
    else:
        results.leave_out("B G, bf16 product with float32 sums", "torch has it on CUDA only")


def attention_helpers(results: Results, scale: Scale) -> None:
    """Case C. The bytes are those of queries, keys, values and what comes out, once each."""
    config = json.loads(SHAPES.read_text(encoding="utf-8")) | scale.model
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, device = config["head_dim"], results.device
    for length in scale.lengths:

        def random(count: int, length: int = length) -> Tensor:
            return torch.randn(1, count, length, size, device=device).bfloat16()

        query, key, value = random(heads), random(kv_heads), random(kv_heads)
        call = AttentionCall(query, key, size**-0.5, Visibility())
        once = query.nbytes + key.nbytes
        results.measure(f"C log-sum-exp, {length}", partial(log_sum_exp, call), moved=once)
        band = once + 4 * length * WINDOW
        results.measure(f"C band, {length}", partial(attention_band, call, WINDOW), moved=band)
        dual = partial(dual_attention, call, value)
        moved = 2 * (2 * query.nbytes + 2 * key.nbytes)
        results.measure(f"C attention in dual numbers, {length}", dual, moved=moved)


def dual_attention(call: AttentionCall, value_BGTD: Tensor) -> None:
    """Attention with its forward derivative, as `exact` runs it in one direction."""
    with torch.no_grad(), forward_ad.dual_level():
        query, key, value = (
            forward_ad.make_dual(each, torch.ones_like(each))
            for each in (call.query_BHTD, call.key_BGTD, value_BGTD)
        )
        blocked_attention(replace(call, query_BHTD=query, key_BGTD=key), value)


def head_and_contractions(results: Results, scale: Scale) -> None:
    """Case D."""
    config = json.loads(SHAPES.read_text(encoding="utf-8")) | scale.model
    vocabulary, hidden, wide = (
        config[key] for key in ("vocab_size", "hidden_size", "intermediate_size")
    )
    device, rows = results.device, 2 * scale.row_tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    states_RH = random(rows, hidden)
    targets_R = torch.zeros(rows, dtype=torch.int64, device=device)
    logits = 4 * rows * vocabulary  # float32, written and read once

    def forward_and_backward() -> None:
        leaves = [states_RH.detach().requires_grad_(), head.weight]
        nll_R = head_nll(leaves[0], head.weight, None, targets_R, None)
        torch.autograd.grad(nll_R.sum(), leaves)

    results.measure("D head, forward and backward", forward_and_backward, moved=2 * logits)
    score = partial(head_loss, states_RH, head, targets_R)
    results.measure("D head, as scoring runs it", score, moved=2 * logits)
    outgrad_RO, act_RI, matrix_OI = random(rows, wide), random(rows, hidden), random(wide, hidden)
    contracted = partial(bilinear_product, outgrad_RO, matrix_OI, act_RI)
    read = outgrad_RO.nbytes + act_RI.nbytes + matrix_OI.nbytes
    results.measure("D contraction with a matrix", contracted, moved=read)
    held_NO, held_NI = random(rows, wide), random(rows, hidden)
    signals = partial(signals_product, outgrad_RO, act_RI, held_NO, held_NI, rows)
    results.measure("D contraction with signals", signals, moved=2 * (read - matrix_OI.nbytes))
    results.measure("D copy of a matrix", matrix_OI.clone, moved=2 * matrix_OI.nbytes)
    on_host = matrix_OI.cpu()
    pinned = on_host.pin_memory() if device.type == "cuda" else on_host
    for name, source in {"pageable": on_host, "pinned": pinned}.items():
        upload = partial(source.to, device, copy=True)
        results.measure(f"D upload of a matrix, {name}", upload, moved=matrix_OI.nbytes)


def show(results: Results) -> None:
    table = Table("case", "ms", "TFLOPS", "GB/s", "over plain", "peak MiB", "note")
    for name, found in results.cases.items():
        ratio = found.get("over_plain_of_32")
        cells = {
            "ms": (found.get("seconds"), 1e3, ".2f"),
            "tflops": (found.get("tflops"), 1, ".1f"),
            "bandwidth": (found.get("gigabytes_per_second"), 1, ".0f"),
            "over_plain": (found.get("over_plain"), 1, ".2f"),
            "peak": (found.get("peak_bytes_above_resident"), 2**-20, ".0f"),
        }
        shown = ["" if x is None else f"{x * unit:{form}}" for x, unit, form in cells.values()]
        note = found.get("error") or found.get("left_out") or ""
        if ratio is not None:
            note = f"with {WHOLE} layers {ratio:.2f}"
        table.add_row(name, *shown, note)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--device", choices=SCALES, default="cuda")
    arguments = parser.parse_args()
    with readable_errors():
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Measures everything. Raises UserError where the device is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu runs small shapes")
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    device, scale = torch.device(arguments.device), SCALES[arguments.device]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"llama-3.1-8b-{LAYERS}-layers"
        save_model(model, scale, device)
        for name, share in {"rows": 1, "short": 2}.items():
            save_rows(Path(folder) / f"{name}.jsonl", scale.row_tokens // share)
        about = circumstances("benchmarks.gpu", device, model)
        results = Results(arguments.output, about, scale, device)
        given = {
            "scale": scale,
            "model": model,
            "data": Path(folder) / "rows.jsonl",
            "short_data": Path(folder) / "short.jsonl",
            "dtype": "bfloat16",
            "max_length": scale.row_tokens,
            "micro_batch": 2,
            "split_terms": False,
        }
        micro_batches(results, argparse.Namespace(**vars(arguments), **given))
    parts = {"B G": products_of_g, "C": attention_helpers, "D": head_and_contractions}
    for name, part in parts.items():
        results.record(f"{name}, all of it", partial(run_part, part, results, scale))
    show(results)


def run_part(part: Callable[..., None], results: Results, scale: Scale) -> dict[str, Any]:
    part(results, scale)
    return {}


if __name__ == "__main__":
    main()
