r"""The learning rate starts anew in every round of a training.

Paper    Renda, Frankle, Carbin. Comparing Rewinding and Fine-tuning in Neural Network Pruning. ICLR 2020.
         arXiv:2003.02389; Zhou et al. Incremental Network Quantization. ICLR 2017. arXiv:1702.03044
Formula  lr(t) = inner((t - t_r) / (t_{r+1} - t_r)) for t_r <= t < t_{r+1}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from espalier.core.fields import Fraction
from espalier.train.schedule import Constant, LearningRateSchedule


@dataclass(frozen=True, kw_only=True)
class Restarted(LearningRateSchedule):
    """``inner`` once in every round; rounds begin at 0 and at each of ``at`` (shares of the training)."""

    id: ClassVar[str] = "restarted"
    inner: LearningRateSchedule = field(default_factory=Constant)
    at: tuple[Fraction, ...] = ()

    def factor(self, step: int, steps: int) -> float:
        marks = sorted({0, steps, *(round(share * steps) for share in self.at)})
        first = max(mark for mark in marks if mark <= step or mark == 0)
        last = min((mark for mark in marks if mark > first), default=steps)
        return self.inner.factor(step - first, max(1, last - first))

    def decay(self, progress: float) -> float:
        """Only :meth:`factor` knows the rounds."""
        return self.inner.decay(progress)
