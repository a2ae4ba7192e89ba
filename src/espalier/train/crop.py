r"""Random crop of the padded image.

Paper    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385
Formula  x'(i, j) = pad(x)(i + a, j + b),   a, b uniform in 0 .. 2 padding
Departs  None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from espalier.core.fields import Pixels
from espalier.train.augmentation import Fill, Geometric, random_window


@dataclass(frozen=True, kw_only=True)
class Crop(Geometric):
    """A window of the image's own size out of the image padded by ``padding`` pixels on every side."""

    id: ClassVar[str] = "crop"
    padding: Pixels = 4
    fill: Fill = "zero"

    def __call__(self, images: Tensor) -> Tensor:
        """The crops."""
        return random_window(images, self.padding, self.fill)
