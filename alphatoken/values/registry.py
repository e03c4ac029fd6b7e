"""Which scorer a configured estimator is."""

from __future__ import annotations

import torch

from alphatoken.config.sections import ValuationConfig
from alphatoken.models.decoder import Decoder
from alphatoken.stability.drift import Drift
from alphatoken.values.estimator import Scorer
from alphatoken.values.exact.scorer import ExactScorer, SliceScale
from alphatoken.values.ghost.scorer import GhostScorer


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
    if config.estimator == "ghost":
        return GhostScorer(decoder, config, device, drift)
    return ExactScorer(decoder, config, device, drift, adam_scale)
