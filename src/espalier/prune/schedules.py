r"""Sparsity schedules: how fast the pruned share grows during training.

Paper    Zhu, Gupta. To prune, or not to prune. ICLR workshop 2018. arXiv:1710.01878 (cubic);
         Han et al. 2015 (listed, iterative)
Formula  u = clip((t - start) / (end - start), 0, 1);   linear: s = s_f u;   cubic: s = s_f + (s_0 - s_f)(1 - u)^3
Departs  t is the share of the training done, not a step count, so a schedule fits any number of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction, Sparsity
from espalier.prune.parts import Schedule


def ramp(progress: float, start: float, end: float) -> float:
    """0 before ``start``, 1 from ``end`` on, linear between."""
    if progress >= end:
        return 1.0
    return max(0.0, (progress - start) / (end - start))


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Everything before the first step; the training that follows repairs."""

    id: ClassVar[str] = "one-shot"

    def sparsity(self, progress: float, final: float) -> float:
        return final


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Grows evenly from ``start`` to ``end`` (shares of the training), then repairs."""

    id: ClassVar[str] = "linear"
    start: Fraction = 0.0
    end: Fraction = 0.7

    def conflicts(self) -> list[str]:
        return [f"start={self.start} must lie before end={self.end}"] if self.start >= self.end else []

    def sparsity(self, progress: float, final: float) -> float:
        return final * ramp(progress, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class Cubic(Schedule):
    """Grows fast first and slowly at the end (automated gradual pruning), from ``initial``."""

    id: ClassVar[str] = "cubic"
    start: Fraction = 0.0
    end: Fraction = 0.7
    initial: Sparsity = 0.0

    def conflicts(self) -> list[str]:
        return [f"start={self.start} must lie before end={self.end}"] if self.start >= self.end else []

    def sparsity(self, progress: float, final: float) -> float:
        initial = min(self.initial, final)
        return final + (initial - final) * (1 - ramp(progress, self.start, self.end)) ** 3


@dataclass(frozen=True, kw_only=True)
class Listed(Schedule):
    """The sparsities of ``values``, one after the other, each for an equal share of the training."""

    id: ClassVar[str] = "listed"
    values: tuple[Sparsity, ...] = (0.5, 0.75, 0.9)

    def conflicts(self) -> list[str]:
        if not self.values or list(self.values) != sorted(self.values):
            return [f"values={self.values} must be sparsities in rising order, at least one"]
        return []

    @property
    def final(self) -> float | None:
        return self.values[-1]

    def sparsity(self, progress: float, final: float) -> float:
        return self.values[min(int(progress * len(self.values)), len(self.values) - 1)]
