r"""Quantized errors: what flows back through the layers has values of a small set, each sample on its own scale.

Paper    Zhou et al. 2016, arXiv:1606.06160, section 2.5 (dorefa); Wu et al. 2018, arXiv:1802.04680 (wage); after Wen
         et al. 2017, arXiv:1705.07878 (terngrad) and Bernstein et al. 2018, arXiv:1802.04434 (sign)
Formula  dL/dy <- Q_e(dL/dy) at the output y of every layer, scaled sample by sample:
         dorefa 2 m (q_k(e / 2m + 1/2 + N) - 1/2);   wage s clip(d round(e / (s d)));   terngrad s sign(e) b;
         sign sign(e) mean|e|
Departs  TernGrad and signSGD are about weight gradients; here they also stand for errors in 2 and 1 bit. Signs are only
         taken on request: the errors of a softmax are many small ones and a large one of the other sign, whose signs
         point all classes the same way. Inside a recurrent layer errors flow in floating point from step to step; those
         that come to its output are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.quantize.gradient_forms import FormedGradient
from espalier.quantize.wage import wage_error


@dataclass(frozen=True, kw_only=True)
class ErrorQuantization(FormedGradient):
    """``form``: how; ``auto`` goes by the bits, TernGrad for 2, else DoReFa: signs alone are no error to learn by.

    ``clip``: TernGrad's bound in standard deviations. ``scaled``: signs keep the mean size.
    """

    id: ClassVar[str] = "error-quantization"
    one_bit: ClassVar[str] = "dorefa"

    def wage(self, gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
        return wage_error(gradient, bits, samples=samples)
