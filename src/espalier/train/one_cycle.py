r"""One cycle: the learning rate climbs to its peak, then falls far below where it began.

Paper    Smith. A disciplined approach to neural network hyper-parameters: Part 1. 2018. arXiv:1803.09820
Formula  lr_t climbs from start lr to lr over warmup T steps, then falls to final lr, both along half a cosine
Departs  Half cosines in place of straight lines; the momentum is not cycled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction
from espalier.train.schedule import LearningRateSchedule


@dataclass(frozen=True, kw_only=True)
class OneCycle(LearningRateSchedule):
    """``start`` and ``final`` are shares of the peak rate."""

    id: ClassVar[str] = "one-cycle"
    warmup: Fraction = 0.3
    start: Fraction = 0.04
    final: Fraction = 1e-4

    def warm(self, progress: float) -> float:
        """From ``start`` to 1."""
        return self.start + (1 - self.start) * (1 - math.cos(math.pi * progress)) / 2

    def decay(self, progress: float) -> float:
        """From 1 to ``final``."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
