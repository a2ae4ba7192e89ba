r"""L2 penalty (ridge, weight decay through the loss).

Paper    Krogh, Hertz. A Simple Weight Decay Can Improve Generalization. NeurIPS 1991.
Formula  L <- L + strength * sum w^2
Departs  No factor 1/2: the gradient is 2 strength w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.train.penalty import WeightPenalty


@dataclass(frozen=True, kw_only=True)
class L2(WeightPenalty):
    """The sum of squared weights."""

    id: ClassVar[str] = "l2"

    def size(self, weight: Tensor) -> Tensor:
        """``sum w^2``."""
        return weight.square().sum()
