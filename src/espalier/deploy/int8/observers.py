"""What looks at activations during calibration and gives their range; percentile and others are passed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from espalier.deploy.runtimes import Array


class Observer(Protocol):
    """Sees one tensor, batch after batch, and keeps little: streaming is its business."""

    def update(self, array: Array) -> None:
        """Look at one batch of the tensor, float32 of any shape."""

    def range(self) -> tuple[float, float]:
        """(low, high): the values that must be told apart; what lies outside is cut."""


ObserverFactory = Callable[[], Observer]


class MinMax:
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def update(self, array: Array) -> None:
        """Widen the range by ``array``."""
        if array.size:
            self.low, self.high = min(self.low, float(array.min())), max(self.high, float(array.max()))

    def range(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.low, self.high
