r"""APoT: sums of powers of two, with a learned clip.

Paper    Li, Dong, Wang. Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural
         Networks. ICLR 2020. arXiv:1909.13144
Formula  Q = alpha gamma {p_0 + ... + p_(n-1)},   p_i in {0, 2^-i, 2^-(i+n), ..., 2^-(i+(2^k-2)n)},   n = b / k;
         w~ = (w - mu) / sigma,   w^ = alpha nearest(clip(w~ / alpha, -1, 1));
         dw^/dalpha = sign(w~) where |w~| > alpha, else w^/alpha - w~/alpha;   dw^/dw~ = 1, for inputs 1[x <= alpha]
Departs  ``rescale`` multiplies by sigma again, so that networks without a batch norm behind the layer keep their
         scale; without it the effective weight is the paper's. Bits that k does not divide make one smaller sum term,
         as in the authors' code. Weights spend one bit on the sign. The clip of inputs starts at the largest value
         seen where that is below ``alpha``; signed inputs have a sign bit. The first layers' bits are Quantize's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.fields import Bits, Positive
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.quantize.grid import TINY
from espalier.quantize.level_sets import in_float32, kept_values, look_up, midpoints, with_signs

SMALLEST = 1e-4


def apot_levels(bits: int, k: int) -> Tensor:
    """The 2^bits sums of powers of two, rising from 0 to 1 (float32)."""
    terms = [[0.0] for _ in range(bits // k)]
    smaller, spare = [0.0], 2 ** (bits % k) - 1
    exponent = 0
    rounds = 2**k - 1 if terms else spare
    for turn in range(rounds):
        if turn >= rounds - spare:
            smaller.append(2.0**-exponent)
            exponent += 1
        for term in terms:
            term.append(2.0**-exponent)
            exponent += 1
    sums = torch.zeros(1, dtype=torch.float64)
    for term in (*terms, smaller):
        sums = (sums[:, None] + torch.tensor(term, dtype=torch.float64)).reshape(-1)
    levels = torch.sort(sums).values
    return (levels / levels[-1]).float()


class Clipped(torch.autograd.Function):
    """``alpha * look_up(x / alpha)`` with the paper's gradient for ``alpha``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, levels: Tensor, thresholds: Tensor, clips: bool) -> Tensor:
        alpha = alpha.clamp_min(SMALLEST)
        scaled = x / alpha
        nearest = look_up(scaled, levels, thresholds)
        ctx.save_for_backward(scaled, nearest, levels[0])
        ctx.clips = clips
        return nearest * alpha

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        scaled, nearest, low = ctx.saved_tensors
        outside = (scaled > 1) | (scaled < low)
        alpha = (grads[0] * torch.where(outside, scaled.clamp(low, torch.ones_like(low)), nearest - scaled)).sum()
        return torch.where(outside, 0, grads[0]) if ctx.clips else grads[0], alpha, None, None, None


def clipped(x: Tensor, alpha: Tensor, levels: Tensor, thresholds: Tensor, *, clips: bool) -> Tensor:
    """``x`` (float32) on ``alpha * levels``. ``clips``: whether the gradient of clipped values is zero."""
    found: Tensor = Clipped.apply(x, alpha, levels, thresholds, clips)  # type: ignore[no-untyped-call]
    return found


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``values`` (1-D); 1 for the deviation where they do not differ."""
    mean, deviation = values.mean(), values.std() if len(values) > 1 else values.new_zeros(())
    return mean, torch.where(deviation > TINY, deviation, 1.0)


@dataclass(frozen=True, kw_only=True)
class APoT(WeightQuantizer):
    """``base_bits``: the paper's k, bits of one term of the sum (1: uniform, all bits: powers of two).

    ``alpha``: where the clip starts, in standard deviations of the weights.
    """

    id: ClassVar[str] = "apot"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    base_bits: Bits = 2
    alpha: Positive = 3.0
    rescale: bool = True

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        levels = with_signs(apot_levels(bits - 1, self.base_bits)).to(weight.device)
        alpha = nn.Parameter(torch.tensor(float(self.alpha), device=weight.device))
        mean, deviation = statistics(kept_values(weight, kept))
        return {
            "alpha": alpha, "levels": levels, "thresholds": midpoints(levels), "mean": mean, "deviation": deviation
        }  # fmt: skip

    def quantize(self, w: Weight) -> Tensor:
        state, deviation = w.state, w.state["deviation"]
        normal = (w.latent.float() - state["mean"]) / deviation
        found = clipped(normal, state["alpha"], state["levels"], state["thresholds"], clips=False)
        return (found * deviation if self.rescale else found).to(w.latent.dtype)

    def after_step(self, w: Weight, loop: Loop) -> None:
        mean, deviation = statistics(kept_values(w.latent, w.kept))
        w.state["mean"].copy_(mean)
        w.state["deviation"].copy_(deviation)


@dataclass(frozen=True, kw_only=True)
class APoTInput(ActivationQuantizer):
    """Inputs clipped at a learned ``alpha``, on sums of powers of two."""

    id: ClassVar[str] = "apot-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    base_bits: Bits = 2
    alpha: Positive = 6.0

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        levels = with_signs(apot_levels(bits - 1, self.base_bits)) if signed else apot_levels(bits, self.base_bits)
        largest = max(observed.high, -observed.low if signed else 0.0)
        alpha = nn.Parameter(torch.tensor(max(SMALLEST, min(float(self.alpha), largest))))
        return {"alpha": alpha, "levels": levels, "thresholds": midpoints(levels)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        alpha, levels, thresholds = a.state["alpha"], a.state["levels"], a.state["thresholds"]
        if a.training:
            return clipped(x.float(), alpha, levels, thresholds, clips=True).to(x.dtype)
        alpha = torch.clamp(alpha, min=SMALLEST)
        found = look_up(in_float32(x) / alpha, levels, thresholds) * alpha
        return found if found.dtype == x.dtype else found.to(x.dtype)
