"""Which scorer a configured estimator is, and how others register theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alphatoken.config.choices import register
from alphatoken.config.estimators import ESTIMATORS, Estimator, keys_of_some, resolve
from alphatoken.config.valuation import ValuationConfig
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import scored_depth
from alphatoken.stability.drift import Drift
from alphatoken.values.estimator import Scorer, SliceScale


def register_estimator(
    name: str,
    scorer: type[Scorer],
    *,
    keys: Sequence[str] = (),
    contrast_sources: Sequence[str] = ("drawn",),
    is_resident: bool = True,
    cost: object | None = None,
) -> None:
    """Makes an estimator known as `valuation.estimator: name`, in this process.

    `keys` are those of the keys that not every estimator reads (`window`, `contraction`,
    `parameters`, `preconditioner`, `target`, `contrast` with `contrast_from` and
    `contrast_memory`, `reliability`) which this one does; the others are refused with it.
    `contrast_sources` are the values of `contrast_from` that it understands, its default first.
    `is_resident` is what `valuation.residency: auto` means. `cost` is a
    `planner.costs.base.ScoringCost`, or where it is ("module:name"); without one, runs cannot be
    planned. Every rank must register it before the configuration is read. Raises ValueError where
    the name is taken or a key is not one of these.
    """
    unknown = sorted(set(keys) - set(keys_of_some()))
    if unknown:
        raise ValueError(
            f"estimator {name!r} reads {', '.join(unknown)}, but the keys that not every estimator "
            f"reads are {', '.join(keys_of_some())}"
        )
    entry = Estimator(
        scorer=scorer,
        cost=cost,
        keys=tuple(keys),
        contrast_sources=tuple(contrast_sources),
        is_resident=is_resident,
    )
    register(ESTIMATORS, name, entry, notion="value estimator")


def scorer_class(estimator: str) -> type[Scorer]:
    """The scorer of a registered estimator."""
    scorer: type[Scorer] = resolve(ESTIMATORS[estimator].scorer)
    return scorer


def build_scorer(
    decoder: Decoder,
    config: ValuationConfig,
    device: torch.device,
    drift: Drift | None,
    adam_scale: SliceScale | None = None,
) -> Scorer:
    """`adam_scale`, for `preconditioner: adam`, is what the run's optimizer multiplies gradients
    by.

    Every rank must call it. Raises UserError when the model has not the configured layers or
    parameters, or `adam_scale` is needed and missing.
    """
    return scorer_class(config.estimator).build(
        decoder, config, device, drift=drift, adam_scale=adam_scale
    )


def valuation_notes(decoder: Decoder, config: ValuationConfig) -> list[str]:
    """What a run's values do not see, a sentence each. Raises UserError when the model has not the
    configured layers."""
    depth = scored_depth(config.layers, len(decoder.layers))
    general = decoder.left_out(depth, config.parameters)
    return [*general, *scorer_class(config.estimator).notes(decoder, config)]
