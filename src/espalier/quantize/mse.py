r"""The range whose squared error of rounding and clipping is the smallest.

Paper    Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort. A White Paper on Neural Network Quantization.
         arXiv:2106.08295 (section 3.1, eq. 3.1); Sung, Shin, Hwang 2015, arXiv:1511.06488 (L2 error minimisation)
Formula  (low, high) = argmin over f of sum (x - Q(x; f min x, f max x))^2,   f = 1/n, 2/n, ..., 1
Departs  Both ends shrink by the same factor, a grid of n of them; of equal errors the wider range is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Count
from espalier.quantize.grid import Grid, grid_for, integer_range
from espalier.quantize.parts import Observer

CHUNK = 2**18
"""So many values are worked on at once: what fits a processor's cache."""


def squared_error(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
) -> Tensor:  # fmt: skip
    """(rows,): the squared error of ``rows`` (rows, n) in ``bits`` bits over the ranges ``low``, ``high`` (rows,)."""
    scale, zero = grid_for(low, high, bits, symmetric=symmetric, narrow=narrow)
    grid = Grid(scale[:, None], zero[:, None], *integer_range(bits, symmetric=symmetric, narrow=narrow))
    return (grid.nearest(rows) - rows).square().sum(1)


def best_factor(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, candidates: int, *, symmetric: bool, narrow: bool
) -> Tensor:  # fmt: skip
    """(rows,): the factor of the range with the smallest error, in the memory of ``rows``."""
    best = torch.ones_like(low)
    least = squared_error(rows, low, high, bits, symmetric=symmetric, narrow=narrow)
    for step in range(candidates - 1, 0, -1):
        factor = step / candidates
        error = squared_error(rows, low * factor, high * factor, bits, symmetric=symmetric, narrow=narrow)
        better = error < least
        best, least = torch.where(better, factor, best), torch.where(better, error, least)
    return best


@dataclass(frozen=True, kw_only=True)
class Mse(Observer):
    """``candidates``: how many ranges are tried for each row."""

    id: ClassVar[str] = "mse"
    candidates: Count = 100

    def conflicts(self) -> list[str]:
        return [*super().conflicts(), *(["candidates=0 leaves no range to try"] if not self.candidates else [])]

    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        low, high = extremes[..., 0].amin(-1).float(), extremes[..., 1].amax(-1).float()
        size = max(1, CHUNK // max(1, rows.shape[1]))
        parts = zip(*(torch.split(part, size) for part in (rows.float(), low, high)), strict=True)
        factor = torch.cat(
            [best_factor(some, a, b, bits, self.candidates, symmetric=symmetric, narrow=narrow) for some, a, b in parts]
        )
        return low * factor, high * factor
