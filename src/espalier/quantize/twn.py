r"""Ternary weight networks: the scale and the threshold that keep closest to the weights.

Paper    Li, Zhang, Liu. Ternary Weight Networks. 2016. arXiv:1605.04711
Formula  min ||w - a t||^2, t in {-1, 0, 1}:   t = sign(w) 1[|w| > D],   a = mean of |w| over |w| > D;
         approximate: D = 0.7 mean|w|;   exact: D maximises (sum of |w| over |w| > D)^2 / #{|w| > D};
         dL/dw = dL/dw^
Departs  Pruned weights count neither in a nor in D. Both are computed when the latent weights change, after a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.fields import Positive
from espalier.core.quantized import Weight, WeightQuantizer, by_channel
from espalier.core.representation import Representation
from espalier.quantize.ternary import scaled, stored, ternary_codes


def mean_beyond(magnitudes: Tensor, threshold: Tensor) -> Tensor:
    """The mean of the entries of each row of ``magnitudes`` (rows, n) above ``threshold`` (rows,); 0 without any."""
    beyond = magnitudes > threshold[:, None]
    return torch.where(beyond, magnitudes, 0.0).sum(1) / beyond.sum(1).clamp_min(1)


def approximate(magnitudes: Tensor, count: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """``(threshold, scale)`` of each row; ``count``: (rows,), the weights that are no pruned zeros."""
    threshold = factor * magnitudes.sum(1) / count.clamp_min(1)
    return threshold, mean_beyond(magnitudes, threshold)


def exact(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """``(threshold, scale)`` of each row: the best of all thresholds, by one sort.

    With the best one, |w| > a/2 are just the weights that are not zero, so a/2 is handed back as the threshold.
    """
    ordered = magnitudes.double().sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    taken = torch.arange(1, sums.shape[1] + 1, device=sums.device)
    best = (sums.square() / taken).argmax(1)
    scale = (sums.gather(1, best[:, None])[:, 0] / (best + 1)).float()
    return scale / 2, scale


@dataclass(frozen=True, kw_only=True)
class TWN(WeightQuantizer):
    """``factor``: of the mean magnitude, in the approximate solution. ``per``: one scale and threshold for each."""

    id: ClassVar[str] = "twn"
    widths: ClassVar[tuple[int, ...]] = (2,)
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale", "threshold"})
    solution: Literal["approximate", "exact"] = "approximate"
    factor: Positive = 0.7
    per: Literal["tensor", "channel"] = "tensor"

    def solve(self, weight: Tensor, axis: int | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(threshold, scale)``, both () or (channels,), float32."""
        axis = axis if self.per == "channel" else None
        kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
        magnitudes = by_channel(torch.where(kept, weight.detach().float().abs(), 0.0), axis)
        if self.solution == "exact":
            threshold, scale = exact(magnitudes)
        else:
            threshold, scale = approximate(magnitudes, by_channel(kept, axis).sum(1), self.factor)
        return (threshold[0], scale[0]) if axis is None else (threshold, scale)

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        threshold, scale = self.solve(weight, axis, kept)
        return {"threshold": threshold, "scale": scale}

    def codes(self, w: Weight) -> Tensor:
        """-1, 0, 1."""
        return ternary_codes(w.latent.detach(), w.channels(w.state["threshold"]))

    def quantize(self, w: Weight) -> Tensor:
        return scaled(w.latent, self.codes(w), w.channels(w.state["scale"]))

    def after_step(self, w: Weight, loop: Loop) -> None:
        threshold, scale = self.solve(w.latent, w.axis, w.kept)
        w.state["threshold"].copy_(threshold)
        w.state["scale"].copy_(scale)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, self.codes(w), w.state["scale"])
