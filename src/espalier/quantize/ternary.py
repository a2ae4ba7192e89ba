r"""Ternary weights by fixed thresholds: -1, 0 or 1.

Paper    Ott, Lin, Zhang, Liu, Bengio. Recurrent Neural Networks With Limited Numerical Precision. 2016.
         arXiv:1608.06902
Formula  w^ = H for w > H/2, -H for w < -H/2, else 0;   dL/dw = dL/dw^;   w <- clip(w, -H, H) after every step;
         c = sqrt(1.5 / (n_in + n_out)) (Glorot);   H = 1 or c
Departs  Training starts from the trained weight, as H clip(w / c, -1, 1), and H = c is the default, which keeps its
         scale: the paper's H = 1 asks for a normalisation behind every layer. A table of shared values has no inputs
         and outputs; its c is max|w|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.binary import glorot
from espalier.quantize.grid import straight_through


def ternary_codes(weight: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) where |w| > ``threshold`` (broadcast), else 0; float32, the weight's shape."""
    weight = weight.float()
    return torch.where(weight.abs() > threshold, weight.sign(), 0.0)


def scaled(weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale`` (computed in float32) in the dtype of ``weight``, straight through to it."""
    return straight_through(weight, (codes * scale).to(weight.dtype))


def stored(w: Weight, values: Tensor, codes: Tensor, scale: Tensor) -> Representation:
    """Codes around zero and their scale, () or (channels,)."""
    return affine(w, values, codes.to(torch.int32), scale, torch.zeros_like(scale, dtype=torch.int32))


def glorot_scale(weight: Tensor) -> float:
    """c = sqrt(1.5 / (n_in + n_out)); max|w| of a table of shared values, which has no inputs and outputs."""
    if weight.ndim > 1:
        return glorot(weight.shape)
    return (float(weight.detach().abs().amax()) if weight.numel() else 0.0) or 1.0


def fixed_scale(weight: Tensor, scale: str) -> Tensor:
    """H, float32: 1 or c."""
    return torch.tensor(1.0 if scale == "one" else glorot_scale(weight), device=weight.device)


def within(weight: Tensor, scale: str) -> Tensor:
    """The latent weight to begin with: H clip(w / c, -1, 1)."""
    c = glorot_scale(weight)
    clipped = weight.clamp(-c, c)
    return clipped / c if scale == "one" else clipped


@dataclass(frozen=True, kw_only=True)
class Ternary(WeightQuantizer):
    """``scale``: what the codes are multiplied with, and where the latent weight is clipped."""

    id: ClassVar[str] = "ternary"
    widths: ClassVar[tuple[int, ...]] = (2,)
    scale: Literal["one", "glorot"] = "glorot"

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {"scale": fixed_scale(weight, self.scale)}

    def latent(self, weight: Tensor, bits: int) -> Tensor:
        return within(weight, self.scale)

    def codes(self, w: Weight) -> Tensor:
        """-1, 0, 1."""
        return ternary_codes(w.latent.detach(), w.state["scale"] / 2)

    def quantize(self, w: Weight) -> Tensor:
        return scaled(w.latent, self.codes(w), w.state["scale"])

    def after_step(self, w: Weight, loop: Loop) -> None:
        limit = float(w.state["scale"])
        w.latent.clamp_(-limit, limit)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, self.codes(w), w.state["scale"])
