r"""Loss-aware binarization: the scale weighs every weight by the curvature of the loss.

Paper    Hou, Yao, Kwok. Loss-aware Binarization of Deep Networks. ICLR 2017. arXiv:1611.01600
Formula  w^ = a b,   b = sign(w),   a = ||d * w||_1 / ||d||_1,   d = sqrt(v) + 1e-8, v Adam's second moments: the
         proximal Newton step min_{a, b} sum of d_i (a b_i - w_i)^2;   g = dL/dw^ goes to w by Adam
Departs  sign(0) = 1. d is 1 before the first step, and pruned weights count in no sum. The optimizer is the recipe's
         and must keep second moments. The gates of a recurrent layer are one weight in torch, so with one scale for
         the tensor they share it; the authors give each its own. Their
         code clips the latent weights to [-1, 1], which the formula has not: here they are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.errors import UsageError
from espalier.core.quantized import Weight, WeightQuantizer, by_channel
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY
from espalier.quantize.ternary import scaled, stored

MOMENTS = "exp_avg_sq"


def check_moments(w: Weight, loop: Loop, who: str) -> None:
    """Raise ``UsageError`` where the optimizer keeps no second moments (those of Adam's kind have ``betas``)."""
    state = loop.optimizer.state.get(w.latent) or {}
    if w.latent.requires_grad and ("betas" not in loop.optimizer.defaults or (state and MOMENTS not in state)):
        raise UsageError(
            f"{who} weighs {w.name} by the second moments of its gradients, which {type(loop.optimizer).__name__} "
            "does not keep. Train with train.adamw: optimizer=espalier.train.AdamW()."
        )


def curvature(w: Weight, loop: Loop) -> Tensor | None:
    """d = sqrt(v) + 1e-8 in float32, the latent weight's shape; None for a weight that has not been trained yet."""
    moments = (loop.optimizer.state.get(w.latent) or {}).get(MOMENTS)
    return None if moments is None else moments.float().sqrt() + 1e-8


def weighed(weight: Tensor, curvature: Tensor | None, axis: int | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(w, d)`` as float64 rows, one for each scale; d is 0 where an earlier step pruned, and 1 without curvature."""
    curvature = torch.ones_like(weight) if curvature is None else curvature
    curvature = curvature.double() if kept is None else torch.where(kept, curvature.double(), 0.0)
    return by_channel(weight.detach().double(), axis), by_channel(curvature, axis)


def binary_scale(rows: Tensor, weights: Tensor) -> Tensor:
    """a of each row (rows,), float32; 0 where nothing is kept."""
    return ((weights * rows.abs()).sum(1) / weights.sum(1).clamp_min(TINY)).float()


def binary_codes(weight: Tensor) -> Tensor:
    """-1 below zero, else 1; float32."""
    return torch.where(weight < 0, -1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class LAB(WeightQuantizer):
    """``per``: one scale for the tensor (the paper's), or one for each output channel."""

    id: ClassVar[str] = "lab"
    widths: ClassVar[tuple[int, ...]] = (1,)
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale"})
    per: Literal["tensor", "channel"] = "tensor"

    def solve(self, weight: Tensor, curvature: Tensor | None, axis: int | None, kept: Tensor | None) -> Tensor:
        """The scale, () or (channels,)."""
        axis = axis if self.per == "channel" else None
        scale = binary_scale(*weighed(weight, curvature, axis, kept))
        return scale[0] if axis is None else scale

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {"scale": self.solve(weight, None, axis, kept)}

    def quantize(self, w: Weight) -> Tensor:
        return scaled(w.latent, binary_codes(w.latent.detach()), w.channels(w.state["scale"]))

    def on_start(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)

    def after_step(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)
        found = curvature(w, loop)
        if found is not None:
            w.state["scale"].copy_(self.solve(w.latent, found, w.axis, w.kept))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, binary_codes(w.latent), w.state["scale"])
