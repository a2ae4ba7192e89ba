r"""Curriculum dropout: nothing is dropped at first, and the rate rises to its full value.

Paper    Morerio, Cavazza, Volpi, Vidal, Murino. Curriculum Dropout. ICCV 2017. arXiv:1703.06229
Formula  keep(t) = (1 - keep) exp(-gamma t / T) + keep, in rates: p(t) = p (1 - exp(-gamma t / T));   gamma = 10
Departs  None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.fields import Positive
from espalier.train.dropout_schedule import DropoutSchedule


@dataclass(frozen=True, kw_only=True)
class CurriculumDropout(DropoutSchedule):
    """``gamma``: how soon the full rate is there; with 10 it is within 1 % of it after half of the steps."""

    id: ClassVar[str] = "curriculum-dropout"
    gamma: Positive = 10.0

    def factor(self, progress: float) -> float:
        """``1 - exp(-gamma progress)``."""
        return 1 - math.exp(-self.gamma * progress)
