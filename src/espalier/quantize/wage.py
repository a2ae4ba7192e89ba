r"""WAGE: gradients and errors scaled by a power of two; errors are rounded, gradients rounded by chance.

Paper    Wu, Li, Chen, Shi. Training and Inference with Integers in Deep Neural Networks. ICLR 2018. arXiv:1802.04680
Formula  s = 2^round(log2 max|x|),   d(k) = 2^(1-k);
         errors: e~ = s clip(d round((e / s) / d), -1 + d, 1 - d);
         gradients: g~ = (s / n) sgn(g) (floor|n g / s| + Bernoulli(|n g / s| - floor|n g / s|))
Departs  The scale s is multiplied back, because layers, norms and optimizer are in floating point here and expect the
         true size. Errors have a scale for each sample; the paper has one for the batch. n, the paper's learning rate
         in steps, is the largest power of two whose codes fit into the bits: 2^(k-2), or 1/2 for 2 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.quantize.gradient_rows import noise, rows


def shift(flat: Tensor) -> Tensor:
    """The power of two next to the largest absolute value of each row, (rows, 1); 1 for a row of zeros."""
    largest = flat.abs().amax(1, keepdim=True)
    exponent = torch.round(torch.log2(torch.where(largest > 0, largest, 1)))
    return torch.exp2(exponent)


def wage_error(error: Tensor, bits: int, *, samples: bool) -> Tensor:
    """``error`` on the even values of 2^(1-bits) times its scale, rounded to the nearest; its shape."""
    flat = rows(error, samples=samples)
    scale, step = shift(flat), 2.0 ** (1 - bits)
    found = scale * torch.clamp(step * torch.round(flat / scale / step), -1 + step, 1 - step)
    return found.reshape(error.shape).to(error.dtype)


def wage_gradient(gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
    """``gradient`` on integers times a power of two, rounded by chance; its shape. E[result] = gradient."""
    flat = rows(gradient, samples=samples)
    unit = shift(flat) / (2.0 ** (bits - 2) if bits > 2 else 0.5)
    size = (flat / unit).abs()
    codes = size.floor() + (noise(flat, generator) < size - size.floor())
    return (unit * flat.sign() * codes).reshape(gradient.shape).to(gradient.dtype)
