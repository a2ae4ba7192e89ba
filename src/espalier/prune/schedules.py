r"""Sparsity schedules: how fast the pruned share grows during training.

Paper    Zhu, Gupta. To prune, or not to prune. ICLR workshop 2018. arXiv:1710.01878 (cubic);
         Han et al. 2015 (listed, iterative); Frankle, Carbin. The Lottery Ticket Hypothesis. ICLR 2019.
         arXiv:1803.03635 (percentile)
Formula  u = clip((t - start) / (end - start), 0, 1);   linear: s = s_f u;   cubic: s = s_f + (s_0 - s_f)(1 - u)^3;
         exponential: s = 1 - (1 - s_f)^u;   percentile: s = 1 - (1 - p)^r after r rounds
Departs  t is the share of the training done, not a step count, so a schedule fits any number of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction, Rounds, Sparsity
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

    @property
    def jumps(self) -> tuple[float, ...]:
        return (0.0,)


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
class Exponential(Schedule):
    """The kept share falls by the same factor in equal times, from ``start`` to ``end``."""

    id: ClassVar[str] = "exponential"
    start: Fraction = 0.0
    end: Fraction = 0.7

    def conflicts(self) -> list[str]:
        return [f"start={self.start} must lie before end={self.end}"] if self.start >= self.end else []

    def sparsity(self, progress: float, final: float) -> float:
        kept: float = (1 - final) ** ramp(progress, self.start, self.end)
        return 1 - kept


@dataclass(frozen=True, kw_only=True)
class Percentile(Schedule):
    """Iterative pruning: in every round ``percent`` (a share) of what is left goes, then training repairs.

    The ``rounds`` rounds share what follows ``start`` of the training evenly: with 20 epochs, 4 rounds and start 0
    the lowest go at the start and every 5 epochs.
    """

    id: ClassVar[str] = "percentile"
    percent: Fraction = 0.2
    rounds: Rounds = 5
    start: Fraction = 0.0

    @property
    def final(self) -> float | None:
        return self.after(self.rounds)

    @property
    def jumps(self) -> tuple[float, ...]:
        return tuple(self.start + (1 - self.start) * i / self.rounds for i in range(self.rounds))

    def after(self, done: int) -> float:
        """The sparsity after ``done`` rounds."""
        kept: float = (1 - self.percent) ** done
        return 1 - kept

    def sparsity(self, progress: float, final: float) -> float:
        done = sum(progress >= at - 1e-9 for at in self.jumps)
        return self.after(done)


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

    @property
    def jumps(self) -> tuple[float, ...]:
        return tuple(i / len(self.values) for i in range(len(self.values)))

    def sparsity(self, progress: float, final: float) -> float:
        return self.values[min(int(progress * len(self.values)), len(self.values) - 1)]
