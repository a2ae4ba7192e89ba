r"""Fixed point: integers times a power of two, whose exponent stays or follows the overflows.

Paper    Courbariaux, Bengio, David. Training deep neural networks with low precision multiplications. ICLR workshop
         2015. arXiv:1412.7024 (static and dynamic fixed point); Gupta et al. 2015, arXiv:1502.02551 (stochastic
         rounding); Gysel, Motamedi, Ghiasi 2016, arXiv:1604.03168 (integer bits from the range)
Formula  w^ = s clip(round(w / s), -2^{b-1}, 2^{b-1} - 1),   s = 2^{-n},   Qm.n: m + n = b - 1,   m = ceil(log2 max|w|)
         dynamic: s <- 2s where more than r_max of the w overflow, else s/2 where no more than r_max of 2w do
         stochastic: floor(w / s + u), u uniform in [0, 1)
Departs  Parameters are updated in floating point, where the first two papers also round the update. A static exponent
         is each layer's own unless integer_bits gives one for all, as the first paper has it. Inputs without
         a sign have no sign bit: m + n = b. The rate of overflow of weights is that at the moment of adjustment, that
         of inputs is counted since the last one, in training. The papers begin dynamic fixed point with a short
         training in floating point; here it begins with the range of the weights and of the calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.errors import NumericError
from espalier.core.fields import Count, Fraction, Steps
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.grid import Grid, fake_quantize, straight_through

LOWEST, HIGHEST = -120, 120
"""Exponents of a scale: float32 holds these and what codes of 16 bits make of them."""

Mode = Literal["static", "dynamic"]
Rounding = Literal["nearest", "stochastic"]


def integer_bits(largest: float) -> int:
    """m = ceil(log2 max|x|), exact; 0 where all is zero. Raises ``NumericError`` for NaN and infinity."""
    if not math.isfinite(largest):
        raise NumericError(
            "values to be put into fixed point hold NaN or infinity: check weights and calibration data."
        )
    mantissa, exponent = math.frexp(largest)
    return 0 if largest == 0 else exponent - int(mantissa == 0.5)


def power(exponent: int) -> Tensor:
    """2^exponent as a float32 scalar, kept in the range that codes of 16 bits leave."""
    return torch.tensor(math.ldexp(1.0, min(max(exponent, LOWEST), HIGHEST)))


def rounded(values: Tensor, grid: Grid, rounding: Rounding) -> Tensor:
    """``values`` on the grid, to nearest or up with the probability of the remainder."""
    if rounding == "nearest":
        return grid.nearest(values)
    scaled = values.float() / grid.scale
    codes = torch.floor(scaled + torch.rand_like(scaled)) + grid.zero
    return grid.values(codes.clamp(grid.low, grid.high).to(torch.int32)).to(values.dtype)


def adjusted(scale: Tensor, over: Tensor, half_over: Tensor, most: float) -> Tensor:
    """The scale after an adjustment: ``over``, ``half_over``: the shares that overflow now, and with half the range."""
    moved = torch.where(over > most, scale * 2, torch.where(half_over <= most, scale / 2, scale))
    return moved.clamp(math.ldexp(1.0, LOWEST), math.ldexp(1.0, HIGHEST))


def overflows(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Bool: which values the codes ``low..high`` cannot hold, once rounded."""
    codes = torch.round(values.float() / scale)
    return (codes < low) | (codes > high)


@dataclass(frozen=True, kw_only=True)
class FixedPoint(WeightQuantizer):
    """``integer_bits``: m; from the largest weight where it is None.

    ``dynamic``: every ``every`` steps the scale follows the share of weights that overflow, ``overflow`` at most.
    ``rounding``: in training; in the end it is to nearest.
    """

    id: ClassVar[str] = "fixed-point"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    mode: Mode = "dynamic"
    integer_bits: Count | None = None
    rounding: Rounding = "nearest"
    overflow: Fraction = 1e-4
    every: Steps = 100

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        seen = weight if kept is None else torch.where(kept, weight, 0)
        m = self.integer_bits
        return {"scale": power((integer_bits(float(seen.abs().max())) if m is None else m) - (bits - 1))}

    def grid(self, w: Weight) -> Grid:
        """Codes of ``w.bits`` bits in two's complement."""
        half = 2 ** (w.bits - 1)
        scale = w.state["scale"]
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), -half, half - 1)

    def quantize(self, w: Weight) -> Tensor:
        grid, latent = self.grid(w), w.latent.detach()
        values = rounded(latent, grid, self.rounding if w.training else "nearest")
        return straight_through(w.latent, values, grid.inside(latent))

    def after_step(self, w: Weight, loop: Loop) -> None:
        if self.mode == "static" or (loop.step + 1) % self.every:
            return
        grid = self.grid(w)
        seen = w.latent if w.kept is None else w.latent[w.kept]
        if seen.numel():
            rates = [overflows(seen, grid.scale * f, grid.low, grid.high).double().mean() for f in (1.0, 0.5)]
            grid.scale.copy_(adjusted(grid.scale, rates[0], rates[1], self.overflow))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        grid = self.grid(w)
        return affine(w, values, grid.codes(w.latent), grid.scale, grid.zero)


@dataclass(frozen=True, kw_only=True)
class FixedPointInput(ActivationQuantizer):
    """The same for inputs; ``integer_bits`` from the largest value of the calibration where it is None."""

    id: ClassVar[str] = "fixed-point-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    mode: Mode = "dynamic"
    integer_bits: Count | None = None
    rounding: Rounding = "nearest"
    overflow: Fraction = 1e-4
    every: Steps = 100

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        m = self.integer_bits
        m = integer_bits(max(-observed.low, observed.high, 0.0)) if m is None else m
        zero = 2 ** (bits - 1) if signed else 0
        return {
            "scale": power(m - (bits - int(signed))),
            "zero": torch.tensor(zero, dtype=torch.int32),
            # values, those that overflow, those that would at half the range
            "seen": torch.zeros(3, dtype=torch.int64),
        }

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        scale, zero = a.state["scale"], a.state["zero"]
        if not a.training:
            return fake_quantize(x, scale, zero, a.bits)
        grid, values = Grid(scale, zero, 0, 2**a.bits - 1), x.detach()
        if self.mode == "dynamic":
            low, high = -a.middle, 2**a.bits - 1 - a.middle
            counts = [overflows(values, scale * factor, low, high).sum() for factor in (1.0, 0.5)]
            a.state["seen"].add_(torch.stack([torch.full_like(counts[0], values.numel()), *counts]))
        return straight_through(x, rounded(values, grid, self.rounding), grid.inside(values))

    def after_step(self, a: Input, loop: Loop) -> None:
        if self.mode == "static" or (loop.step + 1) % self.every:
            return
        seen = a.state["seen"]
        if int(seen[0]):
            rates = seen[1:].double() / seen[0]
            a.state["scale"].copy_(adjusted(a.state["scale"], rates[0], rates[1], self.overflow))
        seen.zero_()
