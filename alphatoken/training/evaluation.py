"""Evaluation of held-out rows during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from alphatoken.batch import Batch
from alphatoken.distributed.sums import NamedSums, mean
from alphatoken.models.decoder import evaluating
from alphatoken.objectives.base import Objective, ResponseLosses
from alphatoken.training.valued_model import ValuedModel
from alphatoken.util.metrics import Metrics


def evaluate(
    *,
    model: ValuedModel,
    objective: Objective,
    batches: Iterable[Batch],
    device: torch.device,
    on_batch: Callable[[], None],
) -> Metrics:
    """Means of what the objective reports of held-out rows, `eval_...`; empty without rows.

    Every rank must call it, with equally many micro-batches. `on_batch` is called before each, and
    may raise on every rank to give up.
    """
    sums = NamedSums(device)
    with evaluating(model):  # without dropout, where training has any
        for batch in batches:
            on_batch()
            losses = ResponseLosses(batch=batch, nll_BT=model.token_losses(batch))
            sums.add_vectors(objective.evaluation(losses))
    return {f"eval_{name}": mean(both) for name, both in sums.reduce().items()}
