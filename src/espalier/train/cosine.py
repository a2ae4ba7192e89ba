r"""Cosine annealing of the learning rate.

Paper    Loshchilov, Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017. arXiv:1608.03983
Formula  lr_t = lr (final + (1 - final) (1 + cos(pi t / T)) / 2)
Departs  One period, no restarts; an optional linear warm-up before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction
from espalier.train.schedule import LearningRateSchedule


@dataclass(frozen=True, kw_only=True)
class Cosine(LearningRateSchedule):
    """Half a cosine from the full rate to the share ``final`` of it."""

    id: ClassVar[str] = "cosine"
    final: Fraction = 0.0

    def decay(self, progress: float) -> float:
        """``final + (1 - final) (1 + cos(pi progress)) / 2``."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
