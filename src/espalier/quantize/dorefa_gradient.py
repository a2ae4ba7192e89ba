r"""DoReFa-Net's gradients: evenly spaced values with noise before rounding, so that the mean is right.

Paper    Zhou, Wu, Ni, Zhou, Wen, Zou. DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
         Bitwidth Gradients. arXiv:1606.06160, section 2.5
Formula  f(dr) = 2 m (q_k(dr / 2m + 1/2 + N) - 1/2);   m = max|dr| of each sample;
         q_k(x) = round((2^k - 1) x) / (2^k - 1);   N ~ U(-1/2, 1/2) / (2^k - 1)
Departs  none
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.quantize.gradient_rows import noise, rows


def dorefa_gradient(gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
    """``gradient`` on 2^bits even values in -m..m, its shape; E[result] = gradient."""
    flat = rows(gradient, samples=samples)
    largest = flat.abs().amax(1, keepdim=True)
    last = 2**bits - 1
    scaled = flat / (2 * torch.where(largest > 0, largest, 1)) + 0.5
    codes = torch.round(scaled * last + noise(flat, generator) - 0.5).clamp(0, last)
    found: Tensor = 2 * largest * (codes / last - 0.5)
    return found.reshape(gradient.shape).to(gradient.dtype)
