r"""Random horizontal flip.

Paper    Krizhevsky, Sutskever, Hinton. ImageNet Classification with Deep Convolutional Neural Networks. NeurIPS 2012.
Formula  x'(i, j) = x(i, W - 1 - j) with the given probability, else x(i, j)
Departs  None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Fraction
from espalier.train.augmentation import Geometric


@dataclass(frozen=True, kw_only=True)
class Flip(Geometric):
    """Left and right swapped, each image by its own coin."""

    id: ClassVar[str] = "flip"
    probability: Fraction = 0.5

    def __call__(self, images: Tensor) -> Tensor:
        """The images, some of them mirrored."""
        coin = torch.rand(len(images), 1, 1, 1, device=images.device) < self.probability
        return torch.where(coin, images.flip(-1), images)
