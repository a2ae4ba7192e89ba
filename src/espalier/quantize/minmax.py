r"""The whole range that was seen, from the smallest to the largest value.

Paper    Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference.
         CVPR 2018. arXiv:1712.05877
Formula  low = min x;   high = max x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.quantize.parts import Observer


@dataclass(frozen=True, kw_only=True)
class MinMax(Observer):
    """No value is clipped."""

    id: ClassVar[str] = "min-max"

    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return extremes[..., 0].amin(-1), extremes[..., 1].amax(-1)
