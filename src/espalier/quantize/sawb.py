r"""SAWB: a uniform grid clipped where two statistics of the weights say.

Paper    Choi, Chuang, Wang, Venkataramani, Srinivasan, Gopalakrishnan. Bridging the Accuracy Gap for 2-bit Quantized
         Neural Networks. arXiv:1807.06964 (section 3)
Formula  a = c1 sqrt(E[w^2]) + c2 E|w|;   w^ = a (2 q - n) / n,   q = round(n (clip(w / a, -1, 1) + 1) / 2),
         n = 2^b - 1
         c1, c2 by regression of the best clips on six standard distributions
Departs  c1 and c2 are those of the authors' code; the same regression made here gives 3.11 and -2.05 at 2 bits, theirs
         are 3.12 and -2.064. With more than 5 bits no line fits those distributions, so it stops there (the authors'
         code has one for 8). The clip is kept between E|w| and max|w|, which the line may leave on weights unlike all
         six.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.quantized import Weight, WeightQuantizer, mean_where
from espalier.quantize.grid import straight_through

COEFFICIENTS: dict[int, tuple[float, float]] = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
}
"""Bits -> (c1, c2)."""


def bound(weight: Tensor, bits: int, kept: Tensor | None) -> Tensor:
    """The clip of a tensor from its kept weights, a float32 scalar; 0 where all are zero."""
    sizes = weight.detach().float().abs()
    sizes = sizes if kept is None else torch.where(kept, sizes, 0)
    c1, c2 = COEFFICIENTS[bits]
    mean = mean_where(sizes, kept, None)
    alpha = c1 * mean_where(sizes.square(), kept, None).sqrt() + c2 * mean
    return torch.minimum(torch.maximum(alpha, mean), sizes.max())


def even_grid(weight: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """The nearest of 2^b values evenly spaced over [-alpha, alpha], in the dtype of ``weight``."""
    n = 2**bits - 1
    share = weight.float() / torch.where(alpha > 0, alpha, 1)
    codes = 2 * torch.round((share.clamp(-1, 1) + 1) / 2 * n) - n
    values: Tensor = codes * (alpha / n)
    return values.to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class SAWB(WeightQuantizer):
    """One clip for the tensor, from the weights as they are now; there is no code for zero."""

    id: ClassVar[str] = "sawb"
    widths: ClassVar[tuple[int, ...]] = tuple(COEFFICIENTS)

    def quantize(self, w: Weight) -> Tensor:
        latent = w.latent.detach()
        return straight_through(w.latent, even_grid(latent, bound(latent, w.bits, w.kept), w.bits))
