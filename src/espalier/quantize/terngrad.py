r"""TernGrad: gradients become -s, 0 or s by chance, so that the mean is right.

Paper    Wen, Xu, Yan, Wu, Wang, Chen, Li. TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
         Learning. NIPS 2017. arXiv:1705.07878
Formula  f(g) = clip(g, -c sigma, c sigma), c = 2.5;   s = max|f(g)| of the layer;
         g~ = s sign(f(g)) b,   P(b = 1) = |f(g)| / s
Departs  There is one worker, so no scale is shared between workers. Errors are scaled and clipped sample by sample,
         which the paper does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.quantize.gradient_rows import noise, rows


def clipped(flat: Tensor, clip: float) -> Tensor:
    """Rows cut off at ``clip`` standard deviations; a row without deviation stays as it is."""
    bound = clip * flat.std(1, correction=0, keepdim=True)
    return torch.where(bound > 0, torch.clamp(flat, -bound, bound), flat)


def terngrad(gradient: Tensor, generator: torch.Generator, *, samples: bool, clip: float | None = 2.5) -> Tensor:
    """``gradient`` as -s, 0 or s, its shape; E[result] is the clipped gradient."""
    flat = rows(gradient, samples=samples)
    if clip is not None:
        flat = clipped(flat, clip)
    largest = flat.abs().amax(1, keepdim=True)
    chosen = noise(flat, generator) * largest < flat.abs()
    return (largest * flat.sign() * chosen).reshape(gradient.shape).to(gradient.dtype)
