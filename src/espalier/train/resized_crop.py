r"""Random crop of random size and shape, resized to the image's own size.

Paper    Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich. Going Deeper with Convolutions.
         CVPR 2015. arXiv:1409.4842 (section 6)
Formula  w = sqrt(area r) W', h = sqrt(area / r) W', W' = sqrt(H W);   area uniform in 8 % .. 100 % of the image,
         log r uniform in log 3/4 .. log 4/3;   place uniform;   x' = the window, bilinear, as H x W
Departs  Windows begin anywhere, not at whole pixels, and are always resized bilinearly. A shape that does not fit is
         drawn again, ten times, then cut to fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Fraction, Positive
from espalier.train.augmentation import Geometric

DRAWS = 10
"""How many shapes are drawn for each image; the first that fits is taken."""


@dataclass(frozen=True, kw_only=True)
class ResizedCrop(Geometric):
    """``area``: smallest and largest share of the image; ``ratio``: smallest and largest width over height."""

    id: ClassVar[str] = "resized-crop"
    area: tuple[Fraction, Fraction] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)

    def conflicts(self) -> list[str]:
        """Both are ranges."""
        found = []
        if not 0 < self.area[0] <= self.area[1]:
            found.append(f"area must rise from above 0; got {self.area}")
        if self.ratio[0] > self.ratio[1]:
            found.append(f"ratio must rise; got {self.ratio}")
        return found

    def __call__(self, images: Tensor) -> Tensor:
        """The crops."""
        n, _, height, width = images.shape
        wide, high = self.shapes(n, width / height, images.device)
        left, top = (torch.rand(n, device=images.device) * (1 - size) for size in (wide, high))
        zero = torch.zeros_like(wide)
        window = torch.stack(  # from the corners -1 and 1 of the result to those of the window
            [wide, zero, 2 * left + wide - 1, zero, high, 2 * top + high - 1], dim=1
        ).reshape(n, 2, 3)
        grid = F.affine_grid(window, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)

    def shapes(self, n: int, aspect: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Widths and heights ``(n,)`` of windows, as shares of those of an image that is ``aspect`` times as wide."""
        drawn = torch.rand(2, n, DRAWS, device=device)
        area = self.area[0] + drawn[0] * (self.area[1] - self.area[0])
        low, high = (math.log(ratio) for ratio in self.ratio)
        ratio = torch.exp(low + drawn[1] * (high - low)) / aspect
        widths, heights = torch.sqrt(area * ratio), torch.sqrt(area / ratio)
        fits = (widths <= 1) & (heights <= 1)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first draw where none fits
        return tuple(size.gather(1, first).squeeze(1).clamp_max(1) for size in (widths, heights))  # type: ignore[return-value]
