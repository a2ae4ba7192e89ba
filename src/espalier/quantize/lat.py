r"""Loss-aware ternarization: threshold and scale weigh every weight by the curvature of the loss.

Paper    Hou, Kwok. Loss-aware Weight Quantization of Deep Networks. ICLR 2018. arXiv:1802.08635 (section 3.1, 3.2)
Formula  min_{a, b} sum of d_i (a b_i - w_i)^2, b in {-1, 0, 1}:   d = sqrt(v) + 1e-8, v Adam's second moments;
         b = sign(w) 1[|w| > a/2],   a = ||b * d * w||_1 / ||b * d||_1;
         approximate: the two in turn, 10 times at most;
         exact: sort |w|, S_k = sum_{i<=k} d_i |w_i|, D_k = sum_{i<=k} d_i, c_k = S_k / D_k / 2; a = 2 c_k for the k
         with the largest c_k^2 D_k;   two scales: the positive and the negative weights apart
Departs  The exact solution takes the best of all k; the paper takes the best of those with |w|_k > c_k > |w|_{k+1},
         which is the same one. The turns start from the last scale (at first from the weights above 0.7 mean|w|). d is
         1 before the first step, and pruned weights count in no sum. The gates of a recurrent layer share a scale.
         The authors' code clips the latent weights to [-1, 1]; here they are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.quantized import Weight, WeightQuantizer, tabled
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY, straight_through
from espalier.quantize.lab import check_moments, curvature, weighed
from espalier.quantize.ternary import stored, ternary_codes

TURNS = 10
SETTLED = 1e-6


def mean_above(magnitudes: Tensor, weights: Tensor, threshold: Tensor) -> Tensor:
    """The mean, weighed by ``weights``, of the entries of each row above ``threshold`` (rows,); 0 without any."""
    weights = torch.where(magnitudes > threshold[:, None], weights, 0.0)
    return (weights * magnitudes).sum(1) / weights.sum(1).clamp_min(TINY)


def alternating(magnitudes: Tensor, weights: Tensor, scale: Tensor | None) -> Tensor:
    """a of each row by turns, from the last ``scale`` (rows,)."""
    if scale is None:
        start = 0.7 * mean_above(magnitudes, (weights > 0).double(), magnitudes.new_full((len(magnitudes),), -1))
        scale = mean_above(magnitudes, weights, start)
    for _ in range(TURNS):
        before, scale = scale, mean_above(magnitudes, weights, scale / 2)
        if bool(((scale - before).abs() < SETTLED).all()):
            break
    return scale


def exact(magnitudes: Tensor, weights: Tensor) -> Tensor:
    """a of each row (rows,): the best of all, by one sort."""
    order = magnitudes.argsort(dim=1, descending=True)
    ordered, their = magnitudes.gather(1, order), weights.gather(1, order)
    mass = their.cumsum(1)
    half = (their * ordered).cumsum(1) / mass.clamp_min(TINY) / 2
    best = (half.square() * mass).argmax(1, keepdim=True)
    return 2 * half.gather(1, best)[:, 0]


@dataclass(frozen=True, kw_only=True)
class LAT(WeightQuantizer):
    """``scales``: one magnitude, or one for each sign. ``per``: for the tensor (the paper's) or each output channel."""

    id: ClassVar[str] = "lat"
    widths: ClassVar[tuple[int, ...]] = (2,)
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale", "positive", "negative"})
    solution: Literal["approximate", "exact"] = "approximate"
    scales: Literal["one", "two"] = "one"
    per: Literal["tensor", "channel"] = "tensor"

    def solve(
        self, weight: Tensor, curvature: Tensor | None, axis: int | None, kept: Tensor | None, last: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The scales by name, () or (channels,) each. ``last``: those so far; empty at first."""
        axis = axis if self.per == "channel" else None
        rows, d = weighed(weight, curvature, axis, kept)
        sides = {"scale": d} if self.scales == "one" else {
            "positive": torch.where(rows > 0, d, 0.0), "negative": torch.where(rows < 0, d, 0.0)
        }  # fmt: skip
        found = {}
        for name, weights in sides.items():
            magnitudes = torch.where(weights > 0, rows.abs(), 0.0)
            before = last[name].double().reshape(-1) if name in last else None
            exactly = self.solution == "exact"
            scale = exact(magnitudes, weights) if exactly else alternating(magnitudes, weights, before)
            found[name] = (scale[0] if axis is None else scale).float()
        return found

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return self.solve(weight, None, axis, kept, {})

    def codes(self, w: Weight) -> tuple[Tensor, Tensor]:
        """-1, 0, 1, and the magnitude of each weight's sign, which broadcasts."""
        weight = w.latent.detach()
        if self.scales == "one":
            scale = w.channels(w.state["scale"])
        else:
            scale = torch.where(weight > 0, w.channels(w.state["positive"]), w.channels(w.state["negative"]))
        return ternary_codes(weight, scale / 2), scale

    def quantize(self, w: Weight) -> Tensor:
        codes, scale = self.codes(w)
        return straight_through(w.latent, (codes * scale).to(w.latent.dtype))

    def on_start(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)

    def after_step(self, w: Weight, loop: Loop) -> None:
        check_moments(w, loop, self.name)
        d = curvature(w, loop)
        if d is not None:
            for name, scale in self.solve(w.latent, d, w.axis, w.kept, w.state.tensors()).items():
                w.state[name].copy_(scale)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, self.codes(w)[0], w.state["scale"]) if self.scales == "one" else tabled(values)
