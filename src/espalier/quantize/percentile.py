r"""The range without the rarest values at its ends.

Paper    Wu, Judd, Zhang, Isaev, Micikevicius. Integer Quantization for Deep Learning Inference: Principles and
         Empirical Evaluation. arXiv:2004.09602 (section 4: percentile calibration)
Formula  symmetric: high = -low = the p-quantile of |x|;   else low, high = the (1 - p)- and the p-quantile of x
Departs  The paper is symmetric; without symmetry each end loses its own share of 1 - p. Quantiles are values that
         occur: the ceil(p n)-th smallest of n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.core.fields import Fraction
from espalier.quantize.parts import Observer


def quantile(rows: Tensor, share: float) -> Tensor:
    """(rows, n) -> (rows,): the smallest value of each row that at least ``share`` of its values do not exceed."""
    count = rows.shape[1]
    rank = math.ceil(share * count - 1e-9 * count)  # a product such as 0.9999 * 10000 may come out a hair too large
    return rows.kthvalue(min(max(rank, 1), count), dim=1).values


@dataclass(frozen=True, kw_only=True)
class Percentile(Observer):
    """``share``: the part of the values that is not clipped; the paper tries 0.999 to 0.999999."""

    id: ClassVar[str] = "percentile"
    share: Fraction = 0.9999

    def conflicts(self) -> list[str]:
        found = [f"share={self.share:g} clips half of the values or more"] if self.share <= 0.5 else []
        return [*super().conflicts(), *found]

    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if symmetric:
            high = quantile(rows.abs(), self.share)
            return -high, high
        return -quantile(-rows, self.share), quantile(rows, self.share)
