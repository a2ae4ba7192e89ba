r"""Powers of two and zero: a product with a weight becomes a shift.

Paper    Zhou, Yao, Guo, Xu, Chen. Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights.
         ICLR 2017. arXiv:1702.03044 (the set and the rounding, equations 1 to 4)
Formula  P = {0, +-2^n2, ..., +-2^n1};   s = max|w|, n1 = floor(log2(4 s / 3)), n2 = n1 + 1 - 2^(b-1) / 2;
         w^ = +-beta where (alpha + beta) / 2 <= |w| < 3 beta / 2 for neighbours alpha < beta of P, else 0
Departs  All weights at once, from latent ones by the straight-through estimator; the paper's order of fixing portions
         is quantize.inq. The set is taken once, when the step starts, and larger weights are clipped to it. ``log``
         rounds the exponent instead, which puts the threshold at sqrt(2) alpha; ``per`` channel is an addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import TINY, straight_through
from espalier.quantize.level_sets import largest, with_signs

Domain = Literal["linear", "log"]


def top_power(largest_magnitude: Tensor) -> Tensor:
    """2^n1 for s = ``largest_magnitude``, any shape; 1 where that is zero. The comparison is exact."""
    s = largest_magnitude.float()
    mantissa, exponent = torch.frexp(s)  # s = mantissa * 2^exponent, mantissa in [1/2, 1)
    n1 = torch.where(mantissa >= 0.75, exponent, exponent - 1)
    return torch.where(s > TINY, torch.ldexp(torch.ones_like(s), n1.clamp(-126, 127)), 1.0)


def magnitudes(bits: int) -> Tensor:
    """The set's magnitudes as shares of the top one: 0, 2^(n2 - n1), ..., 1/2, 1; (2^(bits - 2) + 1,)."""
    exponents = torch.arange(1 - 2 ** (bits - 2), 1)
    return torch.cat([torch.zeros(1), torch.ldexp(torch.ones(len(exponents)), exponents)])


def thresholds(shares: Tensor, domain: Domain) -> Tensor:
    """The smallest magnitude that rounds to each share but zero: halfway to the one below, or halfway in exponents."""
    if domain == "log":
        return shares[1:] / 2**0.5
    return (shares[1:] + shares[:-1]) / 2


def power_of_two(weight: Tensor, top: Tensor, bits: int, domain: Domain = "linear") -> Tensor:
    """``weight`` on the set below ``top`` (2^n1, broadcast against it); float32, its shape."""
    shares = magnitudes(bits).to(weight.device)
    scaled = weight.float() / top
    place = torch.bucketize(scaled.abs(), thresholds(shares, domain), right=True)
    signed = torch.where(scaled < 0, -place, place) + len(shares) - 1
    return with_signs(shares)[signed] * top


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo(WeightQuantizer):
    """2^(bits - 1) + 1 values. ``domain``: whether the nearest value is sought, or the nearest exponent."""

    id: ClassVar[str] = "power-of-two"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    per_channel: ClassVar[frozenset[str]] = frozenset({"top"})
    domain: Domain = "linear"
    per: Literal["tensor", "channel"] = "tensor"

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        return {"top": top_power(largest(weight, kept, axis if self.per == "channel" else None))}

    def quantize(self, w: Weight) -> Tensor:
        latent, top = w.latent.detach(), w.channels(w.state["top"])
        found = power_of_two(latent, top, w.bits, self.domain).to(latent.dtype)
        return straight_through(w.latent, found, latent.abs() <= 1.5 * top)
