r"""The range as an average over the batches in which the last ones count most.

Paper    Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference.
         CVPR 2018. arXiv:1712.05877 (section 3.1)
Formula  low = sum_t d^{T-t} min x_t / sum_t d^{T-t};   high likewise with max x_t;   t = 1..T the batches
Departs  The average is divided by the sum of its factors, so that it needs no starting value; the paper names no decay
         but "close to 1". Weights are one batch: their range is the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Fraction
from espalier.quantize.parts import Observer


def average(extremes: Tensor, decay: float) -> Tensor:
    """(rows, batches, 2) -> (rows, 2): the exponential average over the batches, in the order they came."""
    ages = torch.arange(extremes.shape[1] - 1, -1, -1, device=extremes.device, dtype=torch.float64)
    factors = torch.pow(torch.tensor(decay, dtype=torch.float64, device=extremes.device), ages)
    return ((extremes.double() * factors[:, None]).sum(1) / factors.sum()).to(extremes.dtype)


@dataclass(frozen=True, kw_only=True)
class Ema(Observer):
    """``decay``: how much of the average stays when a batch comes; 1 counts all batches alike."""

    id: ClassVar[str] = "ema"
    decay: Fraction = 0.999

    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        low, high = average(extremes, self.decay).unbind(-1)
        return low, high
