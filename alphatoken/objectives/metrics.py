"""The metrics that objectives report. Nothing is loaded to declare them, so that a page or a
console can name them without torch."""

from __future__ import annotations

from alphatoken.util.metrics import declare

declare(
    "rewards_{chosen,rejected,margin}",
    "beta times the log-ratio over all response tokens (`cpo`: the log-probability; `simpo`, "
    "`orpo`: its mean), and chosen minus rejected",
)
declare("rewards_accuracy", "share of pairs with a positive margin; a tie counts half")
declare("rewards_{chosen,rejected,margin,accuracy}_masked", "rewards over kept tokens")
declare("omega", "derivative of the objective with respect to the chosen response's summed loss")
declare(
    "kl_estimate",
    "rho - 1 - log rho per token, rho = reference / model probability: the divergence from the "
    "reference if the responses were the model's own",
    "nats",
)
declare("length_{chosen,rejected}", "mean response tokens per pair", "tokens")
declare(
    "kept_share_{chosen,rejected}",
    "mean weight of a response's tokens in the loss, zero of those dropped: the share that was "
    "kept, where kept tokens weigh 1",
)
declare(
    "eval_{rewards_margin,rewards_accuracy,length_accuracy}",
    "over the pairs of `data.eval`; `length_accuracy` is that of preferring the longer response",
)
