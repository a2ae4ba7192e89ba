r"""Early dropout: the rate falls to zero, and the rest of the training drops nothing.

Paper    Liu, Xu, Jin, Shen, Darrell. Dropout Reduces Underfitting. ICML 2023. arXiv:2303.01500
Formula  p(t) = p max(0, 1 - t / (until T))
Departs  The paper starts from random weights and ends after a sixth of the epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Fraction
from espalier.train.dropout_schedule import DropoutSchedule


@dataclass(frozen=True, kw_only=True)
class EarlyDropout(DropoutSchedule):
    """``until``: the share of the steps after which nothing is dropped; 0 drops nothing at all."""

    id: ClassVar[str] = "early-dropout"
    until: Fraction = 0.5

    def factor(self, progress: float) -> float:
        """``max(0, 1 - progress / until)``."""
        return max(0.0, 1 - progress / self.until) if self.until else 0.0
