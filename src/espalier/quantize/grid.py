"""The uniform grid, shared by the methods that round to one: ``(code - zero) * scale`` in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.core.errors import NumericError

TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """Integer codes ``low..high``; ``scale`` (float32) and ``zero`` (int32) broadcast against the values."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codes (int32), clipped to the range."""
        scaled = torch.round(values.float() / self.scale) + self.zero
        return scaled.clamp(self.low, self.high).to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for (float32)."""
        return (codes - self.zero).float() * self.scale

    def nearest(self, values: Tensor) -> Tensor:
        """``values`` on the grid, in their dtype."""
        return self.values(self.codes(values)).to(values.dtype)

    def inside(self, values: Tensor) -> Tensor:
        """Where ``values`` are not clipped."""
        scaled = values.float() / self.scale + self.zero
        return (scaled >= self.low - 0.5) & (scaled <= self.high + 0.5)


def integer_range(bits: int, *, symmetric: bool, narrow: bool = False) -> tuple[int, int]:
    """Signed codes -2^(b-1)..2^(b-1)-1 around zero (``narrow``: without the first), else unsigned 0..2^b-1.

    One bit has no two codes around zero: it is unsigned.
    """
    if not symmetric or bits == 1:
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return -half + int(narrow), half - 1


def grid_for(low: Tensor, high: Tensor, bits: int, *, symmetric: bool, narrow: bool = True) -> tuple[Tensor, Tensor]:
    """``(scale, zero)`` for a range; zero is always a code. Shapes as ``low``; float32 and int32.

    Symmetric: s = max|x| / (2^(b-1) - 1), z = 0. Else s = (max - min) / (2^b - 1), z = round(-min / s), where the
    range is widened to hold zero. A range of nothing but zero gets scale 1. Raises ``NumericError`` for NaN and for a
    range that float32 cannot hold.
    """
    symmetric = symmetric and bits > 1
    first, last = integer_range(bits, symmetric=symmetric, narrow=narrow)
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    span = torch.maximum(-low, high) if symmetric else high - low
    if not bool(torch.isfinite(span).all()):
        raise NumericError(
            "a range to quantize holds NaN, infinity, or more than float32 can: check the weights and the "
            "calibration data."
        )
    scale = span / (last if symmetric else last - first)
    scale = torch.where(scale > TINY, scale, 1.0)
    zero = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(first, last)
    return scale, zero.to(torch.int32)


def straight_through(values: Tensor, quantized: Tensor, passes: Tensor | None = None) -> Tensor:
    """``quantized`` forward; backward the identity, only where ``passes`` says so. Values are exact."""
    return StraightThrough.apply(values, quantized, passes)  # type: ignore[no-untyped-call, no-any-return]


class StraightThrough(torch.autograd.Function):
    """The quantized value; the gradient goes to the value it came from (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: object, values: Tensor, quantized: Tensor, passes: Tensor | None) -> Tensor:
        if passes is not None:
            ctx.save_for_backward(passes)  # type: ignore[attr-defined]
        ctx.passing = passes is not None  # type: ignore[attr-defined]
        return quantized.clone() if quantized is values else quantized

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.passing:  # type: ignore[attr-defined]
            (passes,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return torch.where(passes, grads[0], 0), None, None
        return grads[0], None, None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``x`` on the grid of the codes 0..2^b-1, through torch's own operator, so that it exports as Q/DQ.

    ``scale`` (float32) and ``zero`` (int32, a code) are 0-D. The codes lie in the unsigned container of 8 (or 16) bits
    that runtimes know; with fewer bits, what would leave them is clipped before.
    """
    top, last = (255 if bits <= 8 else 65535), 2**bits - 1
    if last < top:
        x = torch.clamp(x, -zero * scale, (last - zero) * scale)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, top)
