"""What one rank says to the others in one optimizer step: the messages of DeepSpeed and of
valuation.

Only ZeRO-3 gathers weights while it runs. Messages of a few numbers (counts, norms, means) are left
out.
"""

from __future__ import annotations

from alphatoken.config.estimators import ESTIMATORS
from alphatoken.passes.head_shares import HeadShares
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.costs import cost_of
from alphatoken.planner.messages import Message, gather, merged
from alphatoken.selection.step import selections_at


def traffic_of(blueprint: Blueprint) -> list[Message]:
    """All messages of a step that is like most others; averaged where held-out signals are not
    refreshed in each."""
    if blueprint.sharding.ranks == 1:
        return []
    messages = [*_engine(blueprint), *_exchanges(blueprint), *_choices(blueprint)]
    if blueprint.depth:
        messages += cost_of(blueprint.config.valuation.estimator).messages(blueprint)
        messages += [*_masters(blueprint), *_statistics(blueprint)]
    if blueprint.config.needs_reference and blueprint.config.reference.mode == "online":
        messages += _online_reference(blueprint)
    return [each for each in messages if each.bytes]


def _engine(blueprint: Blueprint) -> list[Message]:
    sharding, work = blueprint.sharding, blueprint.workload
    trained = [numel for numel, trains in blueprint.numels if trains]
    slices = sum(map(sharding.slice_of, trained))
    weight = sharding.weight_bytes
    if blueprint.gathers is None:
        gradients = sum(trained) * sharding.gradient_bytes
        if sharding.stage < 2:  # summed once, when the accumulation window is over
            summed = [Message("gradients", "all_reduce", 1, gradients)]
        else:
            summed = [
                Message(
                    "gradients", "all_reduce", work.micro_batches, work.micro_batches * gradients
                )
            ]
        updated = (
            [Message("updated weights", "all_gather", 1, slices * weight)] if sharding.stage else []
        )
        return [*summed, *updated]

    def gathered(about: str, numels: tuple[int, ...], share: float = 1.0) -> Message:
        return Message(
            about,
            "all_gather",
            share * len(numels),
            share * sum(map(sharding.slice_of, numels)) * weight,
        )

    gathers = blueprint.gathers
    refreshes = 1 / blueprint.config.valuation.refresh_every
    return [
        gathered("weights, for held-out rows", gathers.steering, refreshes),
        *merged(
            [
                gathered("weights, for training", gathers.training, refreshes),
                gathered("weights, for training", gathers.training_alone, 1 - refreshes),
            ]
        ),
        gathered("small weights, after the step", gathers.persistent),
        Message(
            "gradients",
            "reduce_scatter",
            work.micro_batches,
            work.micro_batches * slices * sharding.ranks * sharding.gradient_bytes,
        ),
    ]


def _exchanges(blueprint: Blueprint) -> list[Message]:
    """Where rows are divided over ranks: parts of rows for heads, before and behind the kernel of
    every attention layer, and what the causal path of values needs of other parts."""
    work, config = blueprint.workload, blueprint.config
    if work.parts == 1:
        return []
    text = blueprint.decoder.config
    shares = HeadShares.of_model(text, work.parts)
    size = getattr(text, "head_dim", None) or text.hidden_size // shares.heads
    sent = work.parts * (shares.queries_sent + shares.keys_sent)
    layers, depth = len(blueprint.decoder.layers), blueprint.depth
    passes = work.micro_batches * (2 + bool(config.train.gradient_checkpointing))
    passes += work.micro_batches * (config.selection.scope == "global_batch")
    every: float = passes * layers
    held_out: float = 0
    if depth:
        scored, steered = cost_of(config.valuation.estimator).attended(blueprint)
        refreshed = work.held_out_batches * blueprint.steering_passes
        every += depth * scored
        held_out = layers * refreshed / config.valuation.refresh_every + depth * steered
    # Of pairs a draw for B has both documents, whichever are held out.
    tokens = every * work.tokens
    tokens += (
        held_out * work.held_out_tokens * (blueprint.steering_documents / blueprint.steering_passes)
    )
    whole = 2 * sent * size * blueprint.sharding.weight_bytes
    count = 2 * (every + held_out)
    return [
        Message("parts of rows for heads", "all_to_all", count, tokens * whole, work.parts),
        *_causal_path(blueprint),
    ]


def _causal_path(blueprint: Blueprint) -> list[Message]:
    """Where rows are divided over ranks: parts of the attention band of every scored layer, and the
    output gradients of values that the window reaches in the parts of others."""
    work, valuation = blueprint.workload, blueprint.config.valuation
    if not (blueprint.depth and "window" in ESTIMATORS[valuation.estimator].keys):
        return []
    window, times = valuation.window, work.micro_batches
    values = [
        len(linear.value_rows)
        if linear.value_rows is not None
        else blueprint.decoder.model.get_parameter(linear.name).shape[int(linear.transposed)]
        for linear in blueprint.decoder.scored_linears(blueprint.depth)
        if linear.is_value and linear.feeds is None
    ]
    band = 4 * work.tokens * work.parts * window
    beyond = work.rows * min(window, work.row_tokens) * blueprint.sharding.weight_bytes
    bands = times * blueprint.depth * bool(window)
    mixed = times * len(values) * bool(window)
    return [
        Message("attention band", "all_to_all", bands, bands * band, work.parts),
        Message(
            "gradients of the next parts",
            "all_gather",
            mixed,
            times * sum(values) * beyond,
            work.parts,
        ),
    ]


def _choices(blueprint: Blueprint) -> list[Message]:
    """What selections read of response tokens, where they are chosen among those of several ranks:
    float64, as long as what the rank has that has most."""
    work, config = blueprint.workload, blueprint.config
    whole_step = config.selection.scope == "global_batch"
    if work.parts == 1 and not whole_step:
        return []
    columns = {name for each in selections_at(config, 1, 1) for name in each.columns()}
    size = 8 * (3 + len(columns)) * work.most_responses * work.micro_batches
    among = None if whole_step else work.parts
    count = 1 if whole_step else work.micro_batches
    return [Message("tokens to choose among", "all_gather", count, size, among)]


def _masters(blueprint: Blueprint) -> list[Message]:
    """At stages 1 and 2 drift reads fp32 masters from the ranks that hold their parts: for V, and
    for its size."""
    if blueprint.sharding.stage not in (1, 2) or not blueprint.has_drift:
        return []
    numels = [numel for segment in blueprint.scored_numels.values() for numel in segment]
    times = 1 + cost_of(blueprint.config.valuation.estimator).drift_uses(blueprint)
    return [
        Message(
            "fp32 masters, for drift", "all_reduce", times * len(numels), times * sum(numels) * 4
        )
    ]


def _statistics(blueprint: Blueprint) -> list[Message]:
    """Adaptation and stability of every response token, for their rank correlation: two float32."""
    if not (blueprint.has_drift and blueprint.config.valuation.split_terms):
        return []
    size = 8 * blueprint.workload.most_responses * blueprint.workload.micro_batches
    return [Message("values, for their correlation", "all_gather", 1, size)]


def _online_reference(blueprint: Blueprint) -> list[Message]:
    """The reference holds no weight longer than it must."""
    if blueprint.sharding.stage < 3:
        return []
    numels, work = [numel for numel, _ in blueprint.numels], blueprint.workload
    times: float = work.micro_batches
    if blueprint.compares_held_out:
        times += work.held_out_batches / blueprint.config.valuation.refresh_every
    return [
        gather(
            blueprint,
            "reference weights",
            numels,
            blueprint.sharding.weight_bytes,
            times,
        )
    ]
