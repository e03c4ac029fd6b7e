"""What the planner asks of an estimator."""

from __future__ import annotations

from abc import ABC, abstractmethod

from alphatoken.models.scored import Segment
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.messages import Message
from alphatoken.planner.parts import Part


class ScoringCost(ABC):
    """Work, memory and messages of scoring with one estimator, on one rank.

    A plan compares estimators: operations are asked for with any other estimator's settings too, so
    they must be there for every number of layers, with and without stability.
    """

    loaded_later_bytes: int = 0
    """Libraries that a CPU process loads when it scores for the first time."""

    @abstractmethod
    def score_flops(self, blueprint: Blueprint) -> int:
        """Floating-point operations of scoring one micro-batch."""

    @abstractmethod
    def refresh_flops(self, blueprint: Blueprint) -> int:
        """Floating-point operations of forming signals from one held-out micro-batch, and from one
        of rows for B where a refresh draws such."""

    def copied_segments(self, blueprint: Blueprint) -> tuple[Segment, ...]:
        """The segments whose weights every rank keeps whole where residency asks for that."""
        return (*blueprint.scored_layers, "norm", "head")

    @abstractmethod
    def steady_parts(self, blueprint: Blueprint) -> list[Part]:
        """Memory that scoring keeps between steps, besides scored weights and Fisher."""

    def renewed_parts(self, blueprint: Blueprint) -> list[Part]:
        """Memory that scoring keeps between steps too, but lets go of before a refresh begins."""
        return []

    @abstractmethod
    def score_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        """Memory that scoring a micro-batch adds to what training holds."""

    @abstractmethod
    def refresh_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        """Memory that forming the held-out signals takes; nothing of training is there."""

    @abstractmethod
    def attended(self, blueprint: Blueprint) -> tuple[float, float]:
        """How often a step takes as much through the attention of a scored layer as a forward pass
        on one micro-batch does, and on one held-out micro-batch: passes back count, and directions
        of derivatives."""

    @abstractmethod
    def messages(self, blueprint: Blueprint) -> list[Message]:
        """Messages of one optimizer step: scored weights, and what they are contracted with."""

    def saved_bytes(self, blueprint: Blueprint) -> int:
        """What a checkpoint holds of the scorer, of all ranks."""
        return 0

    def drift_uses(self, blueprint: Blueprint) -> int:
        """How often a step needs the drift V of every scored weight, where it is on."""
        return 1
