"""Running scales of adaptation and stability."""

from __future__ import annotations

from collections.abc import Sequence


class RunningScales:
    """Running standard deviations of adaptation and stability (`balance: std`): the part weights
    follow from them.

    Each is the root of an exponential mean of the variances of optimizer steps, unbiased by its
    start; steps in which a part does not vary, as stability before anything has moved, do not
    count.
    """

    DECAY = 0.9

    def __init__(self) -> None:
        self.state: list[list[float]] = [[0.0, 0.0], [0.0, 0.0]]
        """Per part, the decayed sum of variances and of ones."""

    def observe(self, deviations: Sequence[float]) -> None:
        """Takes in the standard deviations of adaptation and stability in one optimizer step."""
        for part, deviation in zip(self.state, deviations, strict=True):
            if deviation > 0:
                part[:] = [self.DECAY * part[0] + deviation**2, self.DECAY * part[1] + 1.0]

    def part_weights(self, stability_weight: float) -> tuple[float, float]:
        """(1 / deviation of adaptation, lambda / deviation of stability); (1, 0) before they have
        varied."""
        inverse = [(count / total) ** 0.5 if total > 0 else 0.0 for total, count in self.state]
        return inverse[0] or 1.0, stability_weight * inverse[1]
