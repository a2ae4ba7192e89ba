r"""L1 penalty (lasso): pulls small weights to zero.

Paper    Tibshirani. Regression Shrinkage and Selection via the Lasso. J. R. Stat. Soc. B 58, 1996.
Formula  L <- L + strength * sum |w|
Departs  A subgradient step: weights come close to zero, not exactly to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.train.penalty import WeightPenalty


@dataclass(frozen=True, kw_only=True)
class L1(WeightPenalty):
    """The sum of absolute weights."""

    id: ClassVar[str] = "l1"

    def size(self, weight: Tensor) -> Tensor:
        """``sum |w|``."""
        return weight.abs().sum()
