"""Which scorer a configured estimator is."""

from __future__ import annotations

import torch

from alphatoken.architectures import Decoder
from alphatoken.config import OptimConfig, ValuationConfig
from alphatoken.drift import Drift
from alphatoken.exact import ExactScorer
from alphatoken.ghost import GhostScorer
from alphatoken.scorer import Scorer


def build_scorer(
    decoder: Decoder,
    config: ValuationConfig,
    device: torch.device,
    drift: Drift | None,
    optim: OptimConfig | None = None,
) -> Scorer:
    """`optim` is that of the run, if there is one. Every rank must call it.

    Raises UserError when the model has not the configured layers or parameters, or no optimizer that is needed.
    """
    if config.estimator == "ghost":
        return GhostScorer(decoder, config, device, drift)
    return ExactScorer(decoder, config, device, drift, optim)
