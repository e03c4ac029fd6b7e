"""What is known of response tokens before any is selected, and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from alphatoken.objectives.base import ResponseLosses


class MissingFactError(LookupError):
    """A run does not have what was asked for of its tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenFacts(ResponseLosses):
    """A micro-batch's response tokens as policies see them, (B, T) each; nothing carries a
    graph."""

    protected_BT: Tensor
    """Whether a target ends a turn."""
    values: dict[str, Tensor]
    """The terms and the composite; empty where tokens are not valued."""
    contrast: float = 0.0
    """What the contrast terms are multiplied by in adaptation, and subtracted."""
    entropy: Tensor | None = None
    """Entropy of the predictions, zero off the response; None where nothing of the run needs it."""
    total: Callable[[Tensor], Tensor] = lambda own: own
    """Adds up what each rank has that the micro-batch's rows are divided over: all of them must
    call it. Where they are not divided it gives back what it is given."""

    @property
    def composite_BT(self) -> Tensor:
        """The value. Raises LookupError where tokens are not valued."""
        if "composite" not in self.values:
            raise _missing("composite_BT", needs=("values",))
        return self.values["composite"]

    @property
    def adaptation_BT(self) -> Tensor:
        """The value without stability. Raises LookupError where tokens are not valued."""
        if "direct_target" not in self.values:
            raise _missing("adaptation_BT", needs=("terms",))
        adaptation_BT = self.values["direct_target"] + self.values["causal_target"]
        if self.contrast:
            adaptation_BT = adaptation_BT - self.contrast * (
                self.values["direct_contrast"] + self.values["causal_contrast"]
            )
        return adaptation_BT

    @property
    def spread_BT(self) -> Tensor:
        """Half the difference of the values under two halves of the held-out rows. Raises
        LookupError where values are computed once."""
        if "spread" not in self.values:
            raise _missing("spread_BT", needs=("spread",))
        return self.values["spread"]

    @property
    def entropy_BT(self) -> Tensor:
        """Entropy of the model's prediction over its 20 likeliest tokens, in nats, as
        `models.head.head_entropy` computes it. Raises LookupError where nothing of the run needs
        it."""
        if self.entropy is None:
            raise _missing("entropy_BT", needs=("entropy",))
        return self.entropy

    @property
    def noise_BT(self) -> Tensor:
        """Uniform noise that is the same on any number of ranks. Raises LookupError where no policy
        of the run needs it."""
        if "noise" not in self.batch:
            raise _missing("noise_BT", needs=("noise",))
        return self.batch["noise"]

    @property
    def reference_nll_BT(self) -> Tensor:
        """The reference's token losses, zero off the response. Raises LookupError where nothing of
        the run needs them."""
        if "reference_nll" not in self.batch:
            raise _missing("reference_nll_BT", needs=("reference", "start"))
        return self.batch["reference_nll"]

    @property
    def stored_value_BT(self) -> Tensor:
        """Values that were made before, zero off the response. Raises LookupError where nothing of
        the run needs them."""
        if "stored_value" not in self.batch:
            raise _missing("stored_value_BT", needs=("store",))
        return self.batch["stored_value"]


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What a weight rule is given: the tokens that a selection keeps, of one branch, (R,) each.

    They are those of one micro-batch or, with scope `global_batch`, of all ranks' whole step.
    """

    facts: Mapping[str, Tensor]
    """What the rule reads of each token, by the names it gives them; float64."""
    key_R: Tensor
    """The policy's sort key, float64: higher first, never NaN, but perhaps infinite."""
    group_R: Tensor
    """Number of the token's group by `selection.scope`, from 0; int64."""
    sequence_R: Tensor
    """Number of the token's response, int64; some numbers are left out."""
    exempt_R: Tensor
    """Whether the token is protected, so that it weighs 1 whatever the rule says."""
    parameters: Mapping[str, float]
    """`selection.weight_parameters`, with the rule's defaults."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a selection makes of response tokens, (R,) each."""

    weight_R: Tensor
    """Weight in the loss, float32; zero where a token is masked out."""
    kept_R: Tensor
    """Whether the token is kept, whatever it weighs."""
    vetoed_R: Tensor
    """Whether `selection.veto` rules it out."""
    below_R: Tensor
    """Whether it lies below `selection.threshold`, or below that of `keep_ratio: auto`."""

    @classmethod
    def nothing(cls, tokens: int, device: torch.device) -> Choice:
        """No token is kept, and none is ruled out."""
        no_R = torch.zeros(tokens, dtype=torch.bool, device=device)
        return cls(weight_R=no_R.float(), kept_R=no_R, vetoed_R=no_R.clone(), below_R=no_R.clone())

    def where(self, own_R: Tensor) -> Choice:
        """That among the tokens at these places, int64."""
        return Choice(**{each.name: getattr(self, each.name)[own_R] for each in fields(self)})

    def split(self, counts: Sequence[int]) -> list[Choice]:
        """In parts of so many tokens."""
        parts = [getattr(self, each.name).split(list(counts)) for each in fields(self)]
        names = [each.name for each in fields(self)]
        return [Choice(**dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]

    def put(self, own_R: Tensor, choice: Choice) -> None:
        """Takes over a choice among the tokens at these places, int64."""
        for each in fields(self):
            getattr(self, each.name)[own_R] = getattr(choice, each.name)


@dataclass(frozen=True, kw_only=True)
class WeighedTokens:
    """A micro-batch's response tokens with what a selection made of them."""

    facts: TokenFacts
    choice: Choice
    """Of each response token in order of (row, position)."""


def _missing(fact: str, *, needs: Sequence[str]) -> MissingFactError:
    stated = " or ".join(map(repr, needs))
    return MissingFactError(f"{fact} is not there: what reads it must state need {stated}")
