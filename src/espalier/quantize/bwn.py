r"""Binary weight networks: every filter is a sign pattern times its mean magnitude.

Paper    Rastegari, Ordonez, Redmon, Farhadi. XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
         Networks. ECCV 2016. arXiv:1603.05279 (sections 3.1 and 3.3)
Formula  w^ = a sign(w), a = <|w|> over the filter: the a, b that minimise ||w - a b||^2, b in {-1, 1}^n;
         dL/dw_i = dL/dw^_i (1/n + a 1[|w_i| <= 1])
Departs  n counts the weights an earlier step has kept, and a is their mean. The authors' code also takes the mean over
         the input channels away from the weights, clips them to [-1, 1] at every step and multiplies the gradient
         by n; the paper does not say so, and neither happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.quantized import Weight, WeightQuantizer, affine, by_channel, mean_where
from espalier.core.representation import Representation
from espalier.quantize.binary import signs
from espalier.quantize.grid import straight_through


class _Scaled(torch.autograd.Function):
    """The binary weight forward, the gradient times a factor of each weight backward."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return (grads[0] * factor).to(grads[0].dtype), None, None


@dataclass(frozen=True, kw_only=True)
class BWN(WeightQuantizer):
    """``gradient``: the paper's, or straight through to the latent weight."""

    id: ClassVar[str] = "bwn"
    widths: ClassVar[tuple[int, ...]] = (1,)
    gradient: Literal["paper", "straight-through"] = "paper"

    def scale(self, w: Weight) -> Tensor:
        """a of every filter (float32), shape (channels,) or ()."""
        return mean_where(w.latent.detach().float().abs(), w.kept, w.axis)

    def quantize(self, w: Weight) -> Tensor:
        latent = w.latent.detach()
        scale = w.channels(self.scale(w))
        values = (signs(latent) * scale).to(latent.dtype)
        if self.gradient == "straight-through":
            return straight_through(w.latent, values)
        factor = 1 / w.channels(self._members(w)) + scale * (latent.abs() <= 1)
        values = _Scaled.apply(w.latent, values, factor)  # type: ignore[no-untyped-call]
        assert isinstance(values, Tensor)  # noqa: S101 - torch leaves Function.apply untyped
        return values

    @staticmethod
    def _members(w: Weight) -> Tensor:
        """n of every filter."""
        ones = torch.ones_like(w.latent, dtype=torch.float32) if w.kept is None else w.kept.float()
        count = by_channel(ones, w.axis).sum(1).clamp_min(1)
        return count if w.axis is not None else count[0]

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        scale = self.scale(w)
        return affine(w, values, signs(w.latent).to(torch.int32), scale, torch.zeros_like(scale, dtype=torch.int32))
