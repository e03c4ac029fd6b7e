"""A plan as tables for people, and as plain values for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from alphatoken.passes.head_shares import HeadShares
from alphatoken.planner.compute import Compute
from alphatoken.planner.parts import Part
from alphatoken.planner.plan import PLANNED_BELOW_MEASURED, Plan
from alphatoken.util.wording import plural, size


def as_values(plan: Plan) -> dict[str, Any]:
    """Everything of a plan, for JSON. Bytes and FLOPs are of one rank; messages and FLOPs of one
    optimizer step."""
    ranks = plan.blueprint.sharding.ranks
    memory = plan.memory
    return {
        "model": plan.blueprint.config.model.name_or_path,
        "ranks": ranks,
        "device": plan.device,
        "parameters": _parameters(plan),
        "workload": asdict(plan.blueprint.workload),
        "waiting_in_attention": shares.idle if (shares := _head_shares(plan)) else 0.0,
        "memory": {
            "steady": {part.name: part.bytes for part in memory.steady},
            "moments": {
                name: {part.name: part.bytes for part in parts}
                for name, parts in memory.moments.items()
            },
            "peak_moment": memory.peak_moment,
            "peak": memory.peak,
            "needed": plan.needed,
            "capacity": plan.capacity,
            "fits": plan.fits,
            "activations": plan.activations,
            "copied_to_host": plan.offloaded,
            "elsewhere": {
                part.name: {"bytes": part.bytes, "where": part.where} for part in memory.elsewhere
            },
        },
        "messages": [{**asdict(each), "received": each.received(ranks)} for each in plan.traffic],
        "flops": {
            name: {**asdict(each), "over_plain": each.over_plain}
            for name, each in plan.compute.items()
        }
        or {"without valuation": asdict(plan.own)},
        "advice": [asdict(each) for each in plan.advice],
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the run, its memory, messages and work as tables, then whether it fits."""
    counts, work = _parameters(plan), plan.blueprint.workload
    console.print(
        f"{plan.blueprint.config.model.name_or_path}: {counts['all'] / 1e6:,.1f} million "
        f"parameters, {counts['trained'] / 1e6:,.1f} trained, {counts['scored'] / 1e6:,.1f} "
        f"scored. {plan.blueprint.sharding.ranks} ranks, ZeRO stage "
        f"{plan.blueprint.sharding.stage}; a rank's step has "
        f"{plural(work.micro_batches, 'micro-batch')} of {work.rows} x {work.row_tokens} tokens"
        f"{f' (a row divided by {work.parts})' if work.parts > 1 else ''}, "
        f"{work.responses} of them responses.",
        highlight=False,
    )
    shares = _head_shares(plan)
    if shares is not None:
        console.print(f"Attention: {shares.told}.", highlight=False)
    console.print(_memory_table(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    console.print(_compute_table(plan))
    _print_verdict(plan, console)


def _head_shares(plan: Plan) -> HeadShares | None:
    """How ranks take attention heads where they divide rows."""
    parts = plan.blueprint.workload.parts
    return HeadShares.of_model(plan.blueprint.decoder.config, parts) if parts > 1 else None


def _parameters(plan: Plan) -> dict[str, int]:
    numels = plan.blueprint.numels
    return {
        "all": sum(numel for numel, _ in numels),
        "trained": sum(numel for numel, trains in numels if trains),
        "scored": sum(numel for each in plan.blueprint.scored_numels.values() for numel in each),
    }


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(
        title=f"Memory of one rank, at its peak: {memory.peak_moment}", title_justify="left"
    )
    table.add_column("")
    table.add_column("", justify="right")

    def rows(parts: tuple[Part, ...]) -> None:
        for part in parts:
            if part.bytes:
                table.add_row(part.name, size(part.bytes))

    rows(memory.steady)
    table.add_section()
    rows(memory.moments[memory.peak_moment])
    table.add_section()
    table.add_row("peak", size(memory.peak))
    if plan.device != "cpu":
        table.add_row(
            "with context, buffers of communication and fragmentation (assumed)", size(plan.needed)
        )
    table.add_section()
    for how, count in plan.activations.items():
        table.add_row(f"activations of a micro-batch {how}", size(count))
    for part in memory.elsewhere:
        if part.bytes:
            table.add_row(f"{part.name}, on {part.where}", size(part.bytes))
    if plan.offloaded:
        table.add_row("copied to the host in a step, and as much back", size(plan.offloaded))
    return table


def _traffic_table(plan: Plan) -> Table:
    ranks = plan.blueprint.sharding.ranks
    table = Table(title="Messages of one rank in one optimizer step", title_justify="left")
    for name in ("", "operation"):
        table.add_column(name)
    for name in ("messages", "handed in", "received"):
        table.add_column(name, justify="right")
    for each in plan.traffic:
        table.add_row(
            each.about, each.op, f"{each.count:,.0f}", size(each.bytes), size(each.received(ranks))
        )
    table.add_section()
    totals = (
        sum(each.bytes for each in plan.traffic),
        sum(each.received(ranks) for each in plan.traffic),
    )
    table.add_row("all", "", f"{sum(each.count for each in plan.traffic):,.0f}", *map(size, totals))
    return table


def _compute_table(plan: Plan) -> Table:
    table = Table(title="Work of one rank in one optimizer step, TFLOP", title_justify="left")
    table.add_column("")
    columns: dict[str, Compute] = dict(plan.compute.items()) or {"without valuation": plan.own}
    for name in columns:
        table.add_column(name, justify="right")
    for phase in ("refresh", "ahead", "forward", "score", "backward", "total"):
        values = [getattr(each, phase) for each in columns.values()]
        if any(values):
            table.add_row(phase, *(f"{value / 1e12:,.3f}" for value in values))
    if plan.compute:
        table.add_section()
        table.add_row("a plain step", *(f"{each.plain / 1e12:,.3f}" for each in columns.values()))
        table.add_row("over a plain step", *(f"{each.over_plain:.2f}" for each in columns.values()))
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    if plan.capacity is None or plan.budget is None:
        return
    room = f"{size(plan.needed)} of {size(plan.capacity)} on {plan.device}"
    if plan.fits:
        console.print(f"It fits: {room}.", highlight=False)
        return
    if plan.needed <= plan.capacity:
        off = f"up to {PLANNED_BELOW_MEASURED:.0%} below what runs took"
        console.print(f"It may not fit: {room}, and plans were {off}.", highlight=False)
    else:
        console.print(f"It does not fit: {room}.", highlight=False)
    for each in plan.advice:
        console.print(f"  {each.change}  ->  {size(each.bytes)}", highlight=False, markup=False)
    if not plan.advice or plan.advice[-1].bytes > plan.budget:
        console.print("  and that is not enough: use more or larger devices", highlight=False)
