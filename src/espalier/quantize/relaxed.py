r"""Relaxed Quantization: noise makes rounding a distribution over the grid, which is relaxed to be differentiable.

Paper    Louizos, Reisser, Blankevoort, Gavves, Welling. Relaxed Quantization for Discretized Neural Networks. ICLR
         2019. arXiv:1810.01875
Formula  grid g = alpha [-2^(b-1), ..., 2^(b-1) - 1], or alpha [0, ..., 2^b - 1];   x~ = x + Logistic(0, sigma);
         pi_i = S((g_i + alpha/2 - x) / sigma) - S((g_i - alpha/2 - x) / sigma), over their sum (S: the sigmoid);
         z = softmax((log pi + Gumbel) / lambda);   x^ = sum of z_i g_i (RQ), or one-hot z forward and this z backward
         (RQ-ST);   in use x^ = alpha round(x / alpha), clipped
Departs  alpha and sigma are learned through their logarithms, which keeps them positive and one learning rate right for
         both. The local grid is the points up to ``reach`` sigma from the nearest point, at least one on either side.
         alpha starts as (max - min) / 2^b, sigma as a third of it. The offset beta of the grid is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.fields import Positive
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY, Grid, fake_quantize, integer_range
from espalier.quantize.level_sets import in_float32, kept_values

Estimator = Literal["relaxed", "straight-through"]


def window(x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, reach: float | None) -> tuple[Tensor, Tensor]:
    """``(codes, valid)``: the grid points looked at for each ``x``, (..., m) of them, and which lie in low..high.

    ``reach`` None: the whole grid, for all alike. Otherwise m is the smallest that holds ``reach`` sigma on both sides.
    """
    whole = high - low + 1
    side = whole if reach is None else max(1, math.ceil(reach * float(sigma) / float(alpha)))
    if 2 * side + 1 >= whole:
        codes = torch.arange(low, high + 1, device=x.device)
        return codes, torch.ones_like(codes, dtype=torch.bool)
    centre = torch.round(x / alpha).clamp(low, high)
    codes = centre[..., None] + torch.arange(-side, side + 1, device=x.device)
    return codes, (codes >= low) & (codes <= high)


def log_probabilities(
    x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, reach: float | None = None
) -> tuple[Tensor, Tensor]:
    """``(log pi, codes)``, (..., m): the chance of each grid point looked at; -inf where there is none.

    S(a) - S(b) = S(a) S(-b) (1 - e^(b - a)), and the last factor, the same for every point, cancels.
    """
    codes, valid = window(x.detach(), alpha.detach(), sigma.detach(), low, high, reach)
    distance = codes * alpha - x[..., None]
    logits = F.logsigmoid((distance + alpha / 2) / sigma) + F.logsigmoid((alpha / 2 - distance) / sigma)
    return torch.log_softmax(logits.masked_fill(~valid, -math.inf), -1), codes


def relax(
    x: Tensor, alpha: Tensor, sigma: Tensor, low: int, high: int, *, temperature: float = 1.0,
    reach: float | None = None, estimator: Estimator = "relaxed",
) -> Tensor:  # fmt: skip
    """A draw of the relaxed quantization of ``x`` (float32), its shape; differentiable in x, alpha and sigma."""
    log_pi, codes = log_probabilities(x, alpha, sigma, low, high, reach)
    gumbel = -torch.log(torch.empty_like(log_pi).exponential_().clamp_min(TINY))
    z = torch.softmax((log_pi + gumbel) / temperature, -1)
    if estimator == "straight-through":
        hard = torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
        z = hard + (z - z.detach())
    return (z * codes).sum(-1) * alpha


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
