r"""Loss-aware quantization to m bits: the scale weighs every weight by the curvature of the loss.

Paper    Hou, Kwok. Loss-aware Weight Quantization of Deep Networks. ICLR 2018. arXiv:1802.08635 (section 3.3)
Formula  min_{a, b} sum of d_i (a b_i - w_i)^2, b in Q:   d = sqrt(v) + 1e-8, v Adam's second moments;
         in turn, 10 times at most: b = nearest of Q to w / a,   a = ||b * d * w||_1 / ||b * b * d||_1;
         n = 2^{m-1} - 1:   linear Q = {0, +-1/n, ..., +-1},   logarithmic Q = {0, +-2^{1-n}, ..., +-1/2, +-1}
Departs  The authors' code divides by ||b * d||_1, which is the least-squares scale for ternary weights only. The turns
         start from the last scale, and at first from max|w|. d is 1 before the first step, and pruned weights count in
         no sum. The gates of a recurrent layer share a scale. The authors' code clips the latent weights to [-1, 1];
         here they are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.quantized import Weight, WeightQuantizer, tabled
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY
from espalier.quantize.lab import check_moments, curvature, weighed
from espalier.quantize.lat import SETTLED, TURNS
from espalier.quantize.ternary import scaled, stored


def levels_of(bits: int, kind: str) -> Tensor:
    """The levels of Q that are not negative, rising, float32: 0 and n more up to 1."""
    n = 2 ** (bits - 1) - 1
    steps = torch.arange(1, n + 1, dtype=torch.float32)
    return torch.cat([torch.zeros(1), steps / n if kind == "linear" else torch.exp2(steps - n)])


def nearest(magnitudes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to ``magnitudes / scale`` (broadcast); 0 where the scale is 0."""
    middles = (levels[1:] + levels[:-1]) / 2
    relative = torch.where(scale > 0, magnitudes / scale.clamp_min(TINY), 0.0)
    return torch.bucketize(relative.contiguous(), middles)


def alternating(magnitudes: Tensor, weights: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """a of each row (rows,) by turns, from ``scale`` (rows,)."""
    levels = levels.to(magnitudes)
    for _ in range(TURNS):
        b = levels[nearest(magnitudes, scale[:, None], levels)]
        mass = (weights * b.square()).sum(1)
        before, scale = scale, torch.where(mass > 0, (weights * b * magnitudes).sum(1) / mass.clamp_min(TINY), scale)
        if bool(((scale - before).abs() < SETTLED).all()):
            break
    return scale


@dataclass(frozen=True, kw_only=True)
class LAQ(WeightQuantizer):
    """``levels``: equally spaced, or powers of two. ``per``: one scale for the tensor, or for each output channel."""

    id: ClassVar[str] = "laq"
    widths: ClassVar[tuple[int, ...]] = (3, 4, 5, 6, 7, 8)
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale"})
    levels: Literal["linear", "log"] = "linear"
    per: Literal["tensor", "channel"] = "tensor"

    def solve(
        self, weight: Tensor, bits: int, curvature: Tensor | None, axis: int | None, kept: Tensor | None,
        last: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The scale, () or (channels,). ``last``: the one so far; None at first."""
        axis = axis if self.per == "channel" else None
        rows, d = weighed(weight, curvature, axis, kept)
        magnitudes = torch.where(d > 0, rows.abs(), 0.0)
        start = magnitudes.amax(1)
        if last is not None:
            start = torch.where(last.reshape(-1) > 0, last.reshape(-1).double(), start)
        scale = alternating(magnitudes, d, start, levels_of(bits, self.levels).to(weight.device)).float()
        return scale[0] if axis is None else scale

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {"scale": self.solve(weight, bits, None, axis, kept, None)}

    def places(self, w: Weight) -> Tensor:
        """The index of each weight's level with its sign, float32."""
        weight = w.latent.detach().float()
        levels = levels_of(w.bits, self.levels).to(weight.device)
        return nearest(weight.abs(), w.channels(w.state["scale"]), levels) * weight.sign()

    def step(self, w: Weight) -> Tensor:
        """What a linear place is worth."""
        top: int = 2 ** (w.bits - 1) - 1
        return w.state["scale"] / top

    def quantize(self, w: Weight) -> Tensor:
        places = self.places(w)
        if self.levels == "linear":
            return scaled(w.latent, places, w.channels(self.step(w)))
        levels = levels_of(w.bits, self.levels).to(places.device)
        return scaled(w.latent, levels[places.abs().long()] * places.sign(), w.channels(w.state["scale"]))

    def on_start(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)

    def after_step(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)
        d = curvature(w, loop)
        if d is not None:
            w.state["scale"].copy_(self.solve(w.latent, w.bits, d, w.axis, w.kept, w.state["scale"]))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, self.places(w), self.step(w)) if self.levels == "linear" else tabled(values)
