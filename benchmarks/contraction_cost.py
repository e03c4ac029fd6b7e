"""What the contraction of signals with G and V costs: in passes of their own, as each product used
to be taken, and as `values.algebra.bilinear_products` takes them together.

    python -m benchmarks.contraction_cost --hidden 512 --rows 1024 --output FILE.json

One process, random signals of the linears of one Llama layer (4 query heads to a key head, MLP 3.5
times as wide), with the causal path through the value projection. Rounds alternate. `bytes` are
what all operations read and write, were nothing cached; `peak` counts float32 products held at
once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphatoken.values.algebra import bilinear_products
from benchmarks.measuring import Peak, circumstances, flops, run_cost, seconds

Linear = tuple[list[Tensor], list[Tensor], Tensor]
"""Outgrads (R, O) of each path, G and V (O, I), and what entered (R, I)."""


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that operations take and give, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            tensors = [*tree_leaves(args), *tree_leaves(kwargs), *tree_leaves(result)]
            self.bytes += sum(each.nbytes for each in tensors if isinstance(each, Tensor))
        return result


def layer(hidden: int, rows: int, dtype: torch.dtype, device: torch.device) -> list[Linear]:
    """Signals and matrices of q, k, v, o, gate, up and down."""
    narrow, wide = hidden // 4, 7 * hidden // 2
    shapes = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    shapes += [(wide, hidden), (wide, hidden), (hidden, wide)]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return [
        (
            [random(rows, out) for _ in range(2 if place == 2 else 1)],
            [random(out, inside) for _ in range(2)],
            random(rows, inside),
        )
        for place, (out, inside) in enumerate(shapes)
    ]


def apart(linears: list[Linear]) -> None:
    """Each product by itself, all rows at once."""
    for outgrads, matrices, act_RI in linears:
        for matrix_OI in matrices:
            for outgrad_RO in outgrads:
                ((act_RI @ matrix_OI.T).float() * outgrad_RO.float()).sum(-1)


def together(linears: list[Linear]) -> None:
    for outgrads, matrices, act_RI in linears:
        bilinear_products(outgrads, matrices, act_RI)


def traffic(call: Callable[[], None]) -> int:
    mode = Traffic()
    with mode:
        call()
    return mode.bytes


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    linears = layer(arguments.hidden, arguments.rows, dtype, device)
    calls = {name.__name__: partial(name, linears) for name in (apart, together)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for warm in range(arguments.rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, device)
            if warm:
                times[name].append(taken)
    peak = Peak(device)
    ratios = [after / before for before, after in zip(*times.values(), strict=True)]
    return {
        **circumstances("benchmarks.contraction_cost", device, Path("random")),
        **{name: getattr(arguments, name) for name in ("hidden", "rows", "dtype")},
        "seconds": times,
        "bytes": {name: traffic(call) for name, call in calls.items()},
        "flops": {name: flops(call) for name, call in calls.items()},
        "peak_bytes": {name: peak.of(call) for name, call in calls.items()},
        "seconds, together / apart": statistics.median(ratios),
    }


def show(result: dict[str, Any]) -> None:
    table = Table("products", "median ms", "MB moved", "GFLOP", "peak MB", title=result["device"])
    for name, values in result["seconds"].items():
        table.add_row(
            name,
            f"{statistics.median(values) * 1e3:.1f}",
            f"{result['bytes'][name] / 1e6:.0f}",
            f"{result['flops'][name] / 1e9:.2f}",
            f"{result['peak_bytes'][name] / 1e6:.0f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"seconds, together / apart: {result['seconds, together / apart']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1024, help="response positions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    run_cost(parser, measure, show)


if __name__ == "__main__":
    main()
