"""The metrics of a run, those of its objective included. Nothing is loaded to declare them, so that
a page or a console can name them without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import alphatoken.objectives.metrics  # noqa: F401  declares those of objectives
from alphatoken.util.metrics import declare

if TYPE_CHECKING:
    from torch import Tensor

    from alphatoken.selection.facts import TokenFacts

RESPONSE_MEANS: dict[str, Callable[[TokenFacts], Tensor]] = {}
"""Metrics that are means over response tokens, and what of."""


def declare_response_mean(
    name: str, sentence: str, unit: str = "", *, of: Callable[[TokenFacts], Tensor]
) -> str:
    """Declares a metric that every step computes: the mean over all response tokens of the global
    batch of what `of` gives of a micro-batch, (B, T). Returns its name.

    In a run that does not have a fact that `of` asks for there is no such metric. Raises ValueError
    if the name is declared already.
    """
    RESPONSE_MEANS[declare(name, sentence, unit)] = of
    return name


# Of an optimizer step (step.py).
declare("step", "optimizer steps taken; 0 is the evaluation before training")
declare("lr", "learning rate of the step")
declare("grad_norm", "norm of the gradient before clipping; absent where DeepSpeed keeps none")
declare("response_tokens", "response tokens of the global batch", "tokens")
declare("drift_norm", "|W - W_ref| over the scored weights that have a Fisher, after the step")
declare(
    "fisher_weighted_drift",
    "1/2 sum F (W - W_ref)^2: an estimate of the rise of the reference model's own loss per "
    "completion",
    "nats",
)
declare(
    "seconds_{ahead,forward,score,backward,refresh,optimizer,reference,step}",
    "time of rank 0 in a phase, scoring apart from the pass it happens in; `seconds_step` is the "
    "whole step",
    "s",
)
declare("tokens_per_second", "tokens of all ranks, prompts included, per second", "1/s")
declare("tokens_per_second_per_device", "`tokens_per_second` divided by the ranks", "1/s")
declare(
    "mfu",
    "model FLOPs utilisation: the FLOPs of plain fine-tuning on the step's tokens per second, as a "
    "share of what the devices can do in 16 bit; on listed GPUs (alphatoken/training/speed.py), "
    "for models without experts",
)
declare("peak_memory_bytes", "peak memory of rank 0 since the start", "bytes")

# Over its micro-batches and ranks (statistics.py).
LOSS_KEPT = declare("loss_kept", "mean loss of the tokens trained on", "nats")
declare_response_mean(
    "loss_response", "mean loss of all response tokens", "nats", of=lambda facts: facts.nll_BT
)
LOSS = declare("loss", "the objective per pair, on kept tokens (preference runs)")
CORRELATION = declare(
    "adaptation_stability_rank_correlation",
    "Spearman's rank correlation of adaptation and stability over response tokens",
)

# What selections rule out (dropped.py).
declare("kept_tokens", "tokens of the global batch that were trained on", "tokens")
declare("vetoed_tokens", "tokens of the global batch that `selection.veto` rules out", "tokens")
declare("vetoed_share", "share of the response tokens that `selection.veto` rules out")
declare("vetoed_share_{chosen,rejected}", "the same of one branch's response tokens")
declare(
    "below_threshold_share",
    "share of the response tokens that `selection.threshold` or `keep_ratio: auto` drops",
)
declare("below_threshold_share_{chosen,rejected}", "the same of one branch's response tokens")
declare("weight_mean", "mean weight of the tokens trained on, where they are not weighed alike")
declare(
    "noise_scale",
    "root mean square over response tokens of what a value differs by between two halves of the "
    "held-out rows, halved",
    "value",
)
declare("harmful_share", "share of the response tokens whose value is negative under both halves")
declare("harmful_share_{chosen,rejected}", "the same of one branch's response tokens")

# Values and their terms (moments.py).
declare(
    "{direct,causal}_{target,contrast,proxy}_{mean,std}",
    "mean and standard deviation of a term over all response tokens",
    "value",
)
declare(
    "composite_{mean,std}", "mean and standard deviation of the value of response tokens", "value"
)
declare(
    "{direct_target,causal_target,direct_contrast,causal_contrast,direct_proxy,causal_proxy,composite}"
    "_{mean,std}_{chosen,rejected}",
    "mean and standard deviation of a term or of the value over one branch's response tokens",
    "value",
)
declare("{adaptation,stability}_std", "standard deviation of the part before any weight", "value")
declare(
    "{direct,causal}_{target,contrast,proxy}_share",
    "share of a term in the composite's variance (its weighted covariance with it); they add up "
    "to 1. Contrast is there with `valuation.contrast` only",
)

# Of each source of a mixture (by_source.py).
declare(
    "loss_kept/<source>",
    "`loss_kept` of the rows of one source of a mixture; absent where a step trains on none of its "
    "tokens",
    "nats",
)
declare("kept_share/<source>", "share of a source's response tokens that were trained on")
declare("composite_mean/<source>", "mean value of a source's response tokens", "value")

# On data.eval (evaluation.py).
declare("eval_loss", "the loss of `data.eval`: per response token, or the objective's per pair")

# What a model is asked during a run (asking.py).
declare(
    "eval_{loss,exact_match,acc_norm,acc,perplexity,byte_perplexity,accuracy,accuracy_norm,"
    "pass_at_1}/<task>",
    "measure of a task of `train.evaluate` (docs/evaluation.md)",
)
