"""Which scorer a configured estimator is."""

from __future__ import annotations

import torch

from alphatoken.architectures import Decoder
from alphatoken.config import ValuationConfig
from alphatoken.drift import Drift
from alphatoken.exact import ExactScorer, SliceScale
from alphatoken.ghost import GhostScorer
from alphatoken.scorer import Scorer


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
