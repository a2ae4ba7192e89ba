r"""Learning-rate schedules: constant, linear and in steps.

Paper    none
Formula  lr_t = lr (t + 1) / (W + 1) for t < W = warmup T, else lr decay((t - W) / (T - W))
Departs  Acts on every optimizer step, not on every epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction
from espalier.core.method import Method


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule(Method):
    """What the learning rate is multiplied by at every step; the first share ``warmup`` of the steps climbs to 1."""

    kind: ClassVar[str] = "lr-schedule"
    warmup: Fraction = 0.0

    def factor(self, step: int, steps: int) -> float:
        """The multiplier at ``step`` (from 0) of ``steps``."""
        warm = self.warmup * steps
        if step < warm:
            return self.warm((step + 1) / (warm + 1))
        return self.decay(min(1.0, (step - warm) / max(1.0, steps - warm)))

    def warm(self, progress: float) -> float:
        """The multiplier during the warm-up, ``progress`` in (0, 1)."""
        return progress

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The multiplier after the warm-up, ``progress`` in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Constant(LearningRateSchedule):
    """The same rate throughout."""

    id: ClassVar[str] = "constant"

    def decay(self, progress: float) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(LearningRateSchedule):
    """A straight line from the full rate to the share ``final`` of it."""

    id: ClassVar[str] = "linear"
    final: Fraction = 0.0

    def decay(self, progress: float) -> float:
        """``1 - progress (1 - final)``."""
        return 1 - progress * (1 - self.final)


@dataclass(frozen=True, kw_only=True)
class Step(LearningRateSchedule):
    """The rate times ``by`` at each share ``at`` of the steps."""

    id: ClassVar[str] = "step"
    at: tuple[Fraction, ...] = (0.5, 0.75)
    by: Fraction = 0.1

    def decay(self, progress: float) -> float:
        """``by`` to the number of marks passed."""
        return float(self.by ** sum(progress >= mark for mark in self.at))
