"""A grid: the scale, zero point and codes of one activation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from espalier.core.errors import NumericError
from espalier.deploy.int8.profile import RuntimeProfile

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
SMALLEST, LARGEST = 1e-30, 1e30
"""Scales outside lose the products with weights' scales to underflow or overflow in float32."""


@dataclass(frozen=True)
class Grid:
    """Values ``(code - zero_point) * scale`` for codes ``low..high`` in a tensor of dtype ``container``.

    ``trained``: it stands in the model and was not calibrated.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    container: str
    trained: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    @property
    def fills_container(self) -> bool:
        """Whether saturation of the container alone cuts at both ends."""
        return (self.low, self.high) == LIMITS[self.container]

    @property
    def bits(self) -> int:
        """Bits that number the codes."""
        return int(self.high - self.low).bit_length()


def from_range(low: float, high: float, profile: RuntimeProfile, name: str, *, symmetric: bool = False) -> Grid:
    """The 8-bit grid of an activation with values ``low..high``; zero is always one of its points.

    ``symmetric``: with zero point 0 also where the profile does not ask for it everywhere. Raises ``NumericError`` for
    a range that is dead (all zero), not finite, or too wide or narrow for a scale.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NumericError(
            f"the range of {name!r} is {low} to {high}: calibration saw NaN, infinity or nothing. Check the "
            f"calibration data and the model's outputs, or leave the layer out: keep_fp32=[{name!r}]."
        )
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        raise NumericError(
            f"the activation {name!r} is zero on all calibration data, so it has no scale. Calibrate with more or "
            f"other data, or leave the layers it feeds in fp32: keep_fp32=[{name!r}]."
        )
    symmetric = symmetric or profile.symmetric
    container = profile.container if not symmetric or profile.symmetric or low == 0 else "int8"
    first, last = LIMITS[container]
    if symmetric:
        scale, zero = max(-low, high) / last, 0
    else:
        scale = (high - low) / (last - first)
        zero = int(np.clip(np.rint(first - low / scale), first, last))
    if not SMALLEST <= scale <= LARGEST:
        raise NumericError(
            f"the range of {name!r} is {low:g} to {high:g}; its scale {scale:g} is outside {SMALLEST:g} to {LARGEST:g} "
            f"and overflows in products. Normalise the layer, or leave it out: keep_fp32=[{name!r}]."
        )
    return Grid(float(np.float32(scale)), zero, -last if symmetric and first else first, last, container)


def placed(grid: Grid, profile: RuntimeProfile) -> Grid | None:
    """A trained grid in the profile's container, the same values; None where the container cannot hold it."""
    first, last = LIMITS[profile.container]
    zero = 0 if profile.symmetric else int(np.clip(grid.zero_point - grid.low + first, first, last))
    low, high = grid.low - grid.zero_point + zero, grid.high - grid.zero_point + zero
    if low < first or high > last:
        return None
    return Grid(grid.scale, zero, low, high, profile.container, trained=True)
