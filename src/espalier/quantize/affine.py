r"""Uniform quantization: the nearest of equally spaced values.

Paper    Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference.
         CVPR 2018. arXiv:1712.05877 (section 2.1); Krishnamoorthi 2018, arXiv:1806.08342 (per channel)
Formula  q = clip(round(w / s) + z, q_min, q_max);   w^ = s (q - z);   s = (max - min) / (2^b - 1), z = round(-min / s),
         or symmetric s = max|w| / (2^{b-1} - 1), z = 0
Departs  The range is taken once, when the step starts, and stays while training (quantize.qat lets it follow). One
         symmetric bit takes the asymmetric form: zero and one other value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from espalier.core.fields import Group
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.parametrize import Slot
from espalier.core.quantized import Weight, WeightQuantizer, affine, by_channel, spread
from espalier.core.representation import Representation
from espalier.quantize.grid import Grid, fake_quantize, grid_for, integer_range, straight_through
from espalier.quantize.minmax import MinMax
from espalier.quantize.parts import Observer


def range_of(
    observer: Observer, rows: Tensor, present: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(low, high)``, both (rows,): what ``observer`` makes of the ``present`` entries of each row; 0 without any."""
    count = present.sum(1)
    low, high = torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0])
    for number in sorted(set(count.tolist())):  # rows of equally many entries are one call
        if number:
            some = count == number
            values = rows[some][present[some]].reshape(-1, number)
            extremes = torch.stack(values.aminmax(dim=1), -1)[:, None]
            found = observer.range(values, extremes, bits, symmetric=symmetric)
            low[some], high[some] = (end.to(rows.dtype) for end in found)
    return low, high


@dataclass(frozen=True, kw_only=True)
class Affine(WeightQuantizer):
    """``per``: one scale for the tensor, for each output channel, or for every ``group`` inputs of a channel.

    Transposed convolutions have no groups: they hold the inputs of an output channel apart.
    """

    id: ClassVar[str] = "affine"
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale", "zero"})
    symmetric: bool = True
    per: Literal["tensor", "channel", "group"] = "channel"
    group: Group = 128
    observer: Observer = field(default_factory=MinMax)

    @property
    def by_group(self) -> bool:
        return self.per == "group"

    def refuses(self, slot: Slot) -> str | None:
        if self.by_group and isinstance(slot.module, _ConvTransposeNd):
            return "a transposed convolution holds the inputs of an output channel apart; per=group cannot group them"
        return None

    def rows(self, weight: Tensor, axis: int | None) -> Tensor:
        """The weight as (scales, entries of each); the last group of a channel is filled up with zeros."""
        if self.per == "tensor" or axis is None:
            return weight.reshape(1, -1)
        rows = by_channel(weight, axis)
        if self.per == "channel" or axis != 0:
            return rows
        return F.pad(rows, (0, -rows.shape[1] % self.group)).reshape(-1, self.group)

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        present = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
        rows, present = self.rows(weight.float(), axis), self.rows(present, axis)
        low, high = range_of(self.observer, rows, present, bits, symmetric=self.symmetric)
        scale, zero = grid_for(low, high, bits, symmetric=self.symmetric)
        shape = self.shape(weight, axis)
        return {"scale": scale.reshape(shape), "zero": zero.reshape(shape)}

    def shape(self, weight: Tensor, axis: int | None) -> tuple[int, ...]:
        """Shape of the scales: (), (channels,) or (channels, groups)."""
        if self.per == "tensor" or axis is None:
            return ()
        groups = (-(-weight[0].numel() // self.group),) if self.per == "group" and axis == 0 else ()
        return (weight.shape[axis], *groups)

    def grid(self, w: Weight) -> Grid:
        """The grid, its scales broadcast against the weight."""
        scale, zero = w.state["scale"], w.state["zero"]
        if scale.ndim == 2:
            scale, zero = (spread(values, w.latent.shape, self.group) for values in (scale, zero))
        else:
            scale, zero = w.channels(scale), w.channels(zero)
        low, high = integer_range(w.bits, symmetric=self.symmetric, narrow=True)
        return Grid(scale, zero, low, high)

    def quantize(self, w: Weight) -> Tensor:
        grid = self.grid(w)
        return straight_through(w.latent, grid.nearest(w.latent.detach()), grid.inside(w.latent.detach()))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        scale, zero = w.state["scale"], w.state["zero"]
        codes = self.grid(w).codes(w.latent)
        return affine(w, values, codes, scale, zero, group=self.group if scale.ndim == 2 else None)


@dataclass(frozen=True, kw_only=True)
class AffineInput(ActivationQuantizer):
    """Inputs on a uniform grid whose range ``observer`` takes from calibration; ``symmetric``: around zero."""

    id: ClassVar[str] = "affine-input"
    symmetric: bool = False
    observer: Observer = field(default_factory=MinMax)

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        centred = self.symmetric and signed and bits > 1  # one bit has no two codes around zero
        rows = observed.sample.float()[None]
        extremes = observed.extremes[None]
        low, high = self.observer.range(rows, extremes, bits, symmetric=centred, narrow=False)
        scale, zero = grid_for(low, high, bits, symmetric=centred, narrow=False)
        if centred:
            zero = zero + 2 ** (bits - 1)
        return {"scale": scale.reshape(()), "zero": zero.reshape(())}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        return fake_quantize(x, a.state["scale"], a.state["zero"], a.bits)
