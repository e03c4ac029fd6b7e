"""What is known of response tokens before any is selected, and after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alphatoken.objectives.base import ResponseLosses


@dataclass(frozen=True, kw_only=True)
class TokenFacts(ResponseLosses):
    """A micro-batch's response tokens as policies see them, (B, T) each; nothing carries a
    graph."""

    protected_BT: Tensor
    """Whether a target ends a turn."""
    values: dict[str, Tensor]
    """The terms and the composite; empty where tokens are not valued."""

    @property
    def composite_BT(self) -> Tensor:
        """The value. Raises LookupError where tokens are not valued."""
        if "composite" not in self.values:
            raise _missing("composite_BT", need="values")
        return self.values["composite"]

    @property
    def noise_BT(self) -> Tensor:
        """Uniform noise that is the same on any number of ranks. Raises LookupError where no policy
        of the run needs it."""
        if "noise" not in self.batch:
            raise _missing("noise_BT", need="noise")
        return self.batch["noise"]

    @property
    def reference_nll_BT(self) -> Tensor:
        """The reference's token losses, zero off the response. Raises LookupError where nothing of
        the run needs them."""
        if "reference_nll" not in self.batch:
            raise _missing("reference_nll_BT", need="reference")
        return self.batch["reference_nll"]


@dataclass(frozen=True, kw_only=True)
class WeighedTokens:
    """A micro-batch's response tokens with the weights that a selection gave them."""

    facts: TokenFacts
    weight_R: Tensor
    """Of each response token in order of (row, position), zero where it is masked out."""


def _missing(fact: str, *, need: str) -> LookupError:
    return LookupError(f"{fact} is not there: a policy that reads it must state need {need!r}")
