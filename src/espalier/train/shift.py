r"""Random shift by a few pixels.

Paper    LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. Proc. IEEE 1998.
Formula  x'(i, j) = x(i + a, j + b), outside 0 or the edge,   a, b uniform in -pixels .. pixels
Departs  Whole pixels only; the paper also scales, squeezes and shears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.core.fields import Pixels
from espalier.train.augmentation import Fill, Geometric, random_window


@dataclass(frozen=True, kw_only=True)
class Shift(Geometric):
    """The image moved by at most ``pixels`` per axis; ``fill="edge"`` where the background is not zero (normalised)."""

    id: ClassVar[str] = "shift"
    pixels: Pixels = 2
    fill: Fill = "zero"

    def __call__(self, images: Tensor) -> Tensor:
        """The shifted images."""
        return random_window(images, self.pixels, self.fill)
