r"""L1 penalty (lasso): small weights become exactly zero.

Paper    Tibshirani. Regression Shrinkage and Selection via the Lasso. J. R. Stat. Soc. B 58, 1996;
         Daubechies, Defrise, De Mol. An iterative thresholding algorithm. Comm. Pure Appl. Math. 57, 2004
Formula  L + strength * sum |w|:   w <- sign(w) max(|w| - step * strength, 0) after every step of the optimizer
Departs  step is the optimizer's: lr / (1 - momentum), and lr / (sqrt(v) + eps) per weight with Adam, sqrt(v) being a
         tenth of its mean over the tensor at least: what has had no gradient yet is not erased. Weights in codes take a
         step along the subgradient, as their values are not free to be zero. No mask is left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.train.penalty import WeightPenalty
from espalier.train.proximal import soft_threshold


@dataclass(frozen=True, kw_only=True)
class L1(WeightPenalty):
    """The sum of absolute weights; a weight stays zero while ``|dL/dw|`` is below ``strength``."""

    id: ClassVar[str] = "l1"

    def size(self, weight: Tensor) -> Tensor:
        """``sum |w|``."""
        return weight.abs().sum()

    def proximal(self, weight: Tensor, step: Tensor | float) -> Tensor:
        """Soft thresholding."""
        return soft_threshold(weight, step * self.strength)
