r"""L1 penalty with exact zeros: iterative soft thresholding.

Paper    Tibshirani. Regression Shrinkage and Selection via the Lasso. J. R. Stat. Soc. B 58, 1996;
         Daubechies, Defrise, De Mol. An iterative thresholding algorithm. Comm. Pure Appl. Math. 57, 2004
Formula  L + strength * sum |w|:   w <- sign(w) max(|w| - step * strength, 0) after every step of the optimizer
Departs  step is the optimizer's: lr / (1 - momentum), and lr / (sqrt(v) + eps) per weight with Adam, sqrt(v) being a
         tenth of its mean over the tensor at least. The largest weight of a layer stays where all others are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.prune.penalty import ProximalPenalty
from espalier.train.proximal import soft_threshold


@dataclass(frozen=True, kw_only=True)
class L1(ProximalPenalty):
    """Single weights; ``strength`` is compared with the gradient: a weight stays zero while |dL/dw| is below it."""

    id: ClassVar[str] = "l1"

    def proximal(self, weight: Tensor, step: Tensor | float) -> Tensor:
        return soft_threshold(weight, step * self.strength)
