r"""Quantized weight gradients: what the optimizer gets has values of a small set.

Paper    Zhou et al. 2016, arXiv:1606.06160 (dorefa); Wen et al. 2017, arXiv:1705.07878 (terngrad); Bernstein et al.
         2018, arXiv:1802.04434 (sign); Wu et al. 2018, arXiv:1802.04680 (wage)
Formula  g <- Q_g(g) of every weight of two dimensions or more, before the optimizer's step, scaled layer by layer:
         dorefa 2 m (q_k(g / 2m + 1/2 + N) - 1/2);   terngrad s sign(g) b;   sign sign(g) mean|g|;   wage (s / n) int
Departs  DoReFa-Net has no quantizer for weight gradients apart from that of the errors; here each has bits of its own,
         and the same formula stands for both. The optimizer's own state is in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.quantize.gradient_forms import FormedGradient
from espalier.quantize.wage import wage_gradient


@dataclass(frozen=True, kw_only=True)
class GradientQuantization(FormedGradient):
    """``form``: how; ``auto`` goes by the bits, sign for 1, TernGrad for 2, else DoReFa.

    ``clip``: TernGrad's bound in standard deviations. ``scaled``: signs keep the mean size.
    """

    id: ClassVar[str] = "gradient-quantization"

    def wage(self, gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
        return wage_gradient(gradient, bits, generator, samples=samples)
