r"""DoReFa-Net: weights squeezed into [-1, 1] by tanh, inputs clipped to [0, 1], both rounded evenly.

Paper    Zhou, Wu, Ni, Zhou, Wen, Zou. DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
         Bitwidth Gradients. arXiv:1606.06160
Formula  q_k(r) = round((2^k - 1) r) / (2^k - 1);   weights: 2 q_k(tanh w / (2 max|tanh w|) + 1/2) - 1;
         k = 1: sign(w) E|w| over the tensor, sign(0) = 1;   inputs: q_k(clip(x, 0, 1));   q_k and sign pass gradients
Departs  Inputs with a sign, which the paper does not have, are clipped to [-1, 1] and rounded to 2^k - 1 values around
         zero; with one bit they are taken as inputs without a sign. Inputs of the first and the last layer, which the
         paper leaves as they are, go to the grid of affine-input unless ends=same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, mean_where
from espalier.quantize.grid import fake_quantize, straight_through


def squeezed(weight: Tensor, kept: Tensor | None) -> Tensor:
    """tanh w / max|tanh w|, in [-1, 1]; the maximum is over the kept weights. Differentiable."""
    bent = torch.tanh(weight.float())
    if kept is not None:
        bent = torch.where(kept, bent, 0)
    largest = bent.abs().max()
    return bent / torch.where(largest > 0, largest, 1)


def evenly(values: Tensor, bits: int) -> Tensor:
    """``2 q_k((v + 1) / 2) - 1`` for values in [-1, 1]."""
    n = 2**bits - 1
    rounded: Tensor = (2 * torch.round((values / 2 + 0.5) * n) - n) / n
    return rounded


@dataclass(frozen=True, kw_only=True)
class DoReFa(WeightQuantizer):
    """Weights lose their size: a network without norms after its layers has to learn it anew."""

    id: ClassVar[str] = "dorefa"

    def quantize(self, w: Weight) -> Tensor:
        if w.bits == 1:
            latent = w.latent.detach()
            size = mean_where(latent.float().abs(), w.kept, None)
            return straight_through(w.latent, torch.where(latent >= 0, size, -size).to(latent.dtype))
        values = squeezed(w.latent, w.kept)
        return straight_through(values, evenly(values.detach(), w.bits)).to(w.latent.dtype)


@dataclass(frozen=True, kw_only=True)
class DoReFaInput(ActivationQuantizer):
    """The range is fixed: inputs beyond 1 are clipped, those of first and last layer only with ``ends=same``."""

    id: ClassVar[str] = "dorefa-input"
    at_ends: ClassVar[bool] = False

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        zero = 2 ** (bits - 1) if signed and bits > 1 else 0
        return {"scale": torch.tensor(1 / (2**bits - 1 - zero)), "zero": torch.tensor(zero, dtype=torch.int32)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        low = -1.0 if a.signed and a.bits > 1 else 0.0
        return fake_quantize(torch.clamp(x, low, 1.0), a.state["scale"], a.state["zero"], a.bits)
