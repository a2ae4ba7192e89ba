r"""Levels by quantiles: as many weights on each.

Paper    Zhou, Wang, Wen, He, Zou. Balanced Quantization: An Effective and Efficient Approach to Quantized Neural
         Networks. JCST 2017. arXiv:1706.07145; Dettmers, Pagnoni, Holtzman, Zettlemoyer. QLoRA. NeurIPS 2023.
         arXiv:2305.14314 (the normal quantiles, NF4)
Formula  bin i of 2^b holds the weights between the quantiles i / 2^b and (i + 1) / 2^b; its level is their mean, their
         median, or s (2 i - (2^b - 1)) / (2^b - 1) with s of least squares (``even``, Balanced Quantization);
         ``normal``: max|w| times the quantiles of a normal distribution, zero among them, each weight to the nearest
Departs  The quantiles are exact (the paper also halves bins by their mean, which is cheaper); its scale comes from the
         extremes where s of least squares stands here. ``normal`` has one scale for the tensor, QLoRA for 64 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.callback import Loop
from espalier.core.fields import Steps
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import straight_through
from espalier.quantize.level_sets import kept_values, look_up, midpoints

Values = Literal["mean", "median", "even", "normal"]


def quantiles(ordered: Tensor, count: int) -> Tensor:
    """The largest value of each of ``count`` equally full bins of ``ordered`` (rising, 1-D), but the last."""
    ends = (torch.arange(1, count, device=ordered.device) * len(ordered) + count - 1) // count
    return ordered[ends - 1]


def balanced(values: Tensor, bits: int, kind: Literal["mean", "median", "even"]) -> tuple[Tensor, Tensor]:
    """``(levels, thresholds)`` of equally full bins of ``values`` (1-D). An empty bin has its threshold as level."""
    count, device = 2**bits, values.device
    ordered = torch.sort(values).values
    thresholds = quantiles(ordered, count)
    ends = torch.searchsorted(ordered, thresholds, right=True)
    ends = F.pad(ends, (0, 1), value=len(ordered))
    starts = F.pad(ends[:-1], (1, 0))
    if kind == "even":
        even = (2 * torch.arange(count, device=device) - (count - 1)).float() / (count - 1)
        sides = even.repeat_interleave(ends - starts)
        return even * ((ordered * sides).sum() / sides.square().sum()) + 0, thresholds
    if kind == "mean":
        sums = F.pad(ordered.double().cumsum(0), (1, 0))
        middle = ((sums[ends] - sums[starts]) / (ends - starts).clamp_min(1)).float()
    else:
        last = len(ordered) - 1
        lower, upper = ((starts + ends - 1) // 2).clamp(0, last), ((starts + ends) // 2).clamp(0, last)
        middle = (ordered[lower] + ordered[upper]) / 2
    edges = torch.cat([thresholds, ordered[-1:]])
    return torch.where(ends > starts, middle, edges) + 0, thresholds


def normal_levels(bits: int) -> Tensor:
    """The quantiles of a normal distribution (2^bits,), rising from -1 to 1, with an exact zero; NF4 for 4 bits.

    2^(bits-1) of them are positive and one fewer negative, each half from equally spaced probabilities.
    """
    count = 2**bits
    end = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    half = count // 2
    positive = torch.special.ndtri(torch.linspace(end, 0.5, half + 1, dtype=torch.float64))[:-1]
    negative = -torch.special.ndtri(torch.linspace(end, 0.5, half, dtype=torch.float64))[:-1]
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (levels / levels.abs().max()).float()


@dataclass(frozen=True, kw_only=True)
class Quantile(WeightQuantizer):
    """``values``: which level stands for a bin. ``every``: steps after which the bins follow the weights."""

    id: ClassVar[str] = "quantile"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))
    values: Values = "mean"
    every: Steps = 1

    def levels(self, weight: Tensor, bits: int, kept: Tensor | None) -> dict[str, Tensor]:
        """Levels (2^bits,) and thresholds (2^bits - 1,) for the weights as they are."""
        values = kept_values(weight, kept)
        if self.values == "normal":
            levels = normal_levels(bits).to(values.device) * values.abs().max() + 0
            thresholds = midpoints(levels)
        else:
            levels, thresholds = balanced(values, bits, self.values)
        return {"levels": levels, "thresholds": thresholds}

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return self.levels(weight, bits, kept)

    def quantize(self, w: Weight) -> Tensor:
        return straight_through(w.latent, look_up(w.latent.detach(), w.state["levels"], w.state["thresholds"]))

    def after_step(self, w: Weight, loop: Loop) -> None:
        if loop.step % self.every == 0:
            for name, tensor in self.levels(w.latent, w.bits, w.kept).items():
                w.state[name].copy_(tensor)
