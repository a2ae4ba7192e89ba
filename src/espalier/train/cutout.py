r"""Cutout: a square of every image is blanked.

Paper    DeVries, Taylor. Improved Regularization of Convolutional Neural Networks with Cutout. 2017. arXiv:1708.04552
Formula  x'(i, j) = 0 where a <= i < a + s and b <= j < b + s, else x(i, j);   s = round(size min(H, W)),
         the centre (a + s // 2, b + s // 2) uniform over the pixels
Departs  The side is a share of the image's (the paper: 16 of 32 pixels for CIFAR-10, 8 of 32 for CIFAR-100).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Fraction
from espalier.train.augmentation import Augmentation


@dataclass(frozen=True, kw_only=True)
class Cutout(Augmentation):
    """The square may lie partly outside. Zero is the mean where images are normalised."""

    id: ClassVar[str] = "cutout"
    size: Fraction = 0.5

    def __call__(self, images: Tensor) -> Tensor:
        """The images, each with its own hole."""
        n, _, height, width = images.shape
        side = round(self.size * min(height, width))

        def inside(length: int) -> Tensor:
            first = torch.randint(length, (n, 1), device=images.device) - side // 2
            places = torch.arange(length, device=images.device)
            return (first <= places) & (places < first + side)

        rows, columns = inside(height), inside(width)
        hole = rows[:, None, :, None] & columns[:, None, None, :]
        return images.masked_fill(hole, 0)
