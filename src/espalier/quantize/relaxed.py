r"""Relaxed Quantization: noise makes rounding a distribution over the grid, which is relaxed to be differentiable.

Paper    Louizos, Reisser, Blankevoort, Gavves, Welling. Relaxed Quantization for Discretized Neural Networks. ICLR
         2019. arXiv:1810.01875
Formula  grid g = alpha [-2^(b-1), ..., 2^(b-1) - 1], or alpha [0, ..., 2^b - 1];   x~ = x + Logistic(0, sigma);
         pi_i = S((g_i + alpha/2 - x) / sigma) - S((g_i - alpha/2 - x) / sigma), over their sum (S: the sigmoid);
         z = softmax((log pi + Gumbel) / lambda);   x^ = sum of z_i g_i (RQ), or one-hot z forward and this z backward
         (RQ-ST);   in use x^ = alpha round(x / alpha), clipped
Departs  alpha and sigma are learned through their logarithms, which keeps them positive and one learning rate right for
         both. The local grid is the points up to ``reach`` sigma from the nearest point, at least one on either side.
         alpha starts as (max - min) / 2^b, sigma as a third of it. The offset beta of the grid is zero. A value
         farther than 20 sigma from the grid has the chances of one at 20 sigma, which differ by e^-20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.fields import Positive
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY, Grid, fake_quantize, integer_range
from espalier.quantize.level_sets import in_float32, kept_values

RARE = 100.0
"""No draw from the exponential distribution is larger, so that the only point with a chance keeps it."""

Estimator = Literal["relaxed", "straight-through"]

CHUNK = 2**15
"""Values at a time: all that is computed for them stays in the processor's cache."""

FAR = 20.0
"""How many sigma from the grid: what is farther off has the same chances within e^-20."""


class Relaxation(torch.autograd.Function):
    """A draw for each of ``x`` (n,), and its derivatives by x, alpha and sigma: three numbers each, kept for backward.

    With u and v the upper and the lower end of a point's cell less x, in sigma: pi ~ S(u) S(-v), since S(u) - S(v) =
    S(u) S(-v) (1 - e^(v - u)), whose last factor is the same for every point. exp(Gumbel) is 1 / E for an E of the
    exponential distribution, so z ~ (pi / E)^(1 / lambda), and d(sum of z_i g_i) = sum of z_i (g_i - mean of g)
    d(log pi_i) / lambda.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, side: int | None, temperature: float,
        hard: bool,
    ) -> Tensor:  # fmt: skip
        """``side``: points looked at on either side of the nearest; None for all of low..high."""
        found, *slopes = (torch.empty_like(x) for _ in range(4))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            values = _draw(x[part], alpha, sigma, low, high, side, temperature, hard)
            for whole, value in zip((found, *slopes), values, strict=True):
                whole[part] = value
        ctx.save_for_backward(*slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """By x, and by alpha and sigma in all."""
        by_x, by_alpha, by_sigma = ctx.saved_tensors
        return grads[0] * by_x, grads[0] @ by_alpha, grads[0] @ by_sigma, None, None, None, None, None


def _draw(
    x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, side: int | None, temperature: float, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The draw and its derivatives, (n,) each; inside, (points, n)."""
    steps = torch.arange(high - low + 1 if side is None else 2 * side + 1, device=x.device, dtype=x.dtype)[:, None]
    codes = steps + (low if side is None else torch.round(x / alpha).clamp(low, high) - side)
    near = x.clamp((low - 0.5) * alpha - FAR * sigma, (high + 0.5) * alpha + FAR * sigma)
    v = ((codes - 0.5) * alpha - near) / sigma
    u = v + alpha / sigma
    below, over = v.sigmoid(), u.neg().sigmoid()
    chances = u.sigmoid() * v.neg().sigmoid()
    if side is not None:
        chances *= (codes >= low) & (codes <= high)
    z = chances / torch.rand_like(chances).log_().neg_().clamp_(TINY, RARE)
    if temperature != 1:
        z = (z / z.amax(0)) ** (1 / temperature)
    z /= z.sum(0)
    mean = (z * codes).sum(0)
    taken = torch.where(z == z.amax(0), codes, -math.inf).amax(0) if hard else mean
    pull = z * (codes - mean) * (alpha / (sigma * temperature))
    slope = below - over
    by_alpha = taken + (pull * (0.5 * (below + over) - codes * slope)).sum(0)
    return taken * alpha, (pull * slope).sum(0), by_alpha, (pull * (v * below - u * over)).sum(0)


def relax(
    x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, *, temperature: float = 1.0,
    reach: float | None = None, estimator: Estimator = "relaxed",
) -> Tensor:  # fmt: skip
    """A draw of the relaxed quantization of ``x`` (float32), its shape; differentiable in x, alpha and sigma.

    ``reach`` None: over the whole grid. Otherwise over the fewest points that hold ``reach`` sigma on both sides.
    """
    side = None if reach is None else max(1, math.ceil(reach * float(sigma.detach()) / float(alpha.detach())))
    if side is not None and 2 * side + 1 >= high - low + 1:
        side = None
    hard = estimator == "straight-through"
    settings = (low, high, side, temperature, hard)
    drawn: Tensor = Relaxation.apply(x.reshape(-1), alpha, sigma, *settings)  # type: ignore[no-untyped-call]
    return drawn.reshape(x.shape)


def beginning(low: float, high: float, bits: int, noise: float) -> dict[str, Tensor]:
    """The learned logarithms of the grid's step and of the noise for values in low..high; step 1 for no range."""
    alpha = (high - low) / 2**bits
    alpha = alpha if alpha > TINY else 1.0
    return {
        "log_scale": nn.Parameter(torch.tensor(math.log(alpha))),
        "log_sigma": nn.Parameter(torch.tensor(math.log(noise * alpha))),
    }


@dataclass(frozen=True, kw_only=True)
class Relaxed(WeightQuantizer):
    """``temperature``: the paper's lambda. ``noise``: sigma at the start, in steps of the grid.

    ``reach``: how many sigma the local grid extends, the paper's delta; None for the whole grid.
    """

    id: ClassVar[str] = "relaxed"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    estimator: Estimator = "relaxed"
    temperature: Positive = 1.0
    noise: Positive = 1 / 3
    reach: Positive | None = 3.0

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        largest = float(kept_values(weight, kept).abs().max())
        made = beginning(-largest, largest, bits, self.noise)
        return {name: nn.Parameter(tensor.detach().to(weight.device)) for name, tensor in made.items()}

    def grid(self, w: Weight) -> Grid:
        """The grid as it is now."""
        scale = w.state["log_scale"].detach().exp()
        low, high = integer_range(w.bits, symmetric=True)
        return Grid(scale, torch.zeros((), dtype=torch.int32, device=scale.device), low, high)

    def quantize(self, w: Weight) -> Tensor:
        grid = self.grid(w)
        if not w.training:
            return grid.nearest(w.latent)
        found = relax(
            w.latent.float(), w.state["log_scale"].exp(), w.state["log_sigma"].exp(), grid.low, grid.high,
            temperature=self.temperature, reach=self.reach, estimator=self.estimator,
        )  # fmt: skip
        return found.to(w.latent.dtype)

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        grid = self.grid(w)
        return affine(w, values, grid.codes(w.latent), grid.scale, grid.zero)


@dataclass(frozen=True, kw_only=True)
class RelaxedInput(ActivationQuantizer):
    """The same for the input of a layer: codes 0..2^b - 1, around the middle one where calibration saw a sign."""

    id: ClassVar[str] = "relaxed-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 9))
    estimator: Estimator = "relaxed"
    temperature: Positive = 1.0
    noise: Positive = 1 / 3
    reach: Positive | None = 3.0

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        high = max(observed.high, -observed.low if signed else 0.0)
        zero = torch.tensor(2 ** (bits - 1) if signed else 0, dtype=torch.int32)
        return {**beginning(-high if signed else 0.0, high, bits, self.noise), "zero": zero}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        scale = torch.exp(a.state["log_scale"])
        if not a.training:
            return fake_quantize(x, scale.detach(), a.state["zero"], a.bits)
        found = relax(
            in_float32(x), scale, torch.exp(a.state["log_sigma"]), -a.middle, 2**a.bits - 1 - a.middle,
            temperature=self.temperature, reach=self.reach, estimator=self.estimator,
        )  # fmt: skip
        return found.to(x.dtype)
