r"""Value-aware quantization: the few large values exactly in 16 bits, so that all others get a fine grid.

Paper    Park, Yoo, Vajda. Value-Aware Quantization for Training and Inference of Neural Networks. ECCV 2018.
         arXiv:1804.07802
Formula  T = the (1 - r) quantile of |x|;   x^ = x in 16 bits where |x| > T;   s round(x / s) elsewhere,
         s = T / (2^{b-1} - 1), or T / (2^b - 1) for inputs without a sign
Departs  Which weights are large is decided once, when the step starts; those that training makes larger than T later
         are clipped. T of the weights is the largest of the others. The 16 bits of a weight are float16; a large input
         is left as it is, since runtimes compute in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.errors import NumericError
from espalier.core.fields import Fraction
from espalier.core.forms import dtype_name, to_numpy
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine, tabled
from espalier.core.representation import Affine, Dense, Outliers, Representation
from espalier.quantize.grid import Grid, fake_quantize, grid_for, integer_range, straight_through

RATIO = 0.01
LARGEST = float(torch.finfo(torch.float16).max)


def large_ones(weight: Tensor, ratio: float, kept: Tensor | None = None) -> Tensor:
    """Mask of the ``floor(ratio n)`` largest of the n kept magnitudes; equal ones by position."""
    sizes = weight.detach().abs().reshape(-1)
    count = len(sizes) if kept is None else int(kept.sum())
    if kept is not None:
        sizes = sizes.masked_fill(~kept.reshape(-1), -1)
    chosen = sizes.argsort(descending=True, stable=True)[: int(ratio * count + 1e-9)]
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[chosen] = True
    return mask.reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class ValueAware(WeightQuantizer):
    """``ratio``: r, the share of the weights that stays exact."""

    id: ClassVar[str] = "value-aware"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    ratio: Fraction = RATIO

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        large = large_ones(weight, self.ratio, kept)
        sizes = weight.detach().abs().float()
        if bool((sizes[large] > LARGEST).any()):
            raise NumericError(f"a large weight of {float(sizes.max()):g} does not fit into 16 bits ({LARGEST:g})")
        rest = ~large if kept is None else ~large & kept
        most = torch.where(rest, sizes, 0).max() if sizes.numel() else sizes.new_zeros(())
        scale, zero = grid_for(-most, most, bits, symmetric=True)
        return {"large": large, "scale": scale, "zero": zero}

    def grid(self, w: Weight) -> Grid:
        """The grid of the others."""
        return Grid(w.state["scale"], w.state["zero"], *integer_range(w.bits, symmetric=True, narrow=True))

    def quantize(self, w: Weight) -> Tensor:
        grid, latent, large = self.grid(w), w.latent.detach(), w.state["large"]
        exact = latent.clamp(-LARGEST, LARGEST).half().to(latent.dtype)
        return straight_through(
            w.latent, torch.where(large, exact, grid.nearest(latent)), large | grid.inside(latent)
        )  # fmt: skip

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        codes, large = self.grid(w).codes(w.latent), w.state["large"]
        if w.kept is not None:
            codes, large = codes.masked_fill(~w.kept, 0), large & w.kept
        if not bool(large.any()):
            return affine(w, values, codes, w.state["scale"], w.state["zero"])
        name, few = dtype_name(values.dtype), to_numpy(w.latent.clamp(-LARGEST, LARGEST).half()[large])
        coarse = to_numpy(codes[~large]).astype("int8" if w.bits <= 8 else "int16")
        scale, zero = to_numpy(w.state["scale"]), to_numpy(w.state["zero"])
        found = Outliers(
            shape=tuple(values.shape), dtype=name, mask=to_numpy(large),
            inner=Affine(
                shape=coarse.shape, dtype=name, codes=coarse, scale=scale, zero_point=zero, bits_per_code=w.bits
            ),
            exact=Dense(shape=few.shape, dtype=name, values=few, stored="float16"),
        )  # fmt: skip
        same = bool((torch.from_numpy(found.dense()).to(values.dtype) == values.cpu()).all())
        return found if same else tabled(values)


@dataclass(frozen=True, kw_only=True)
class ValueAwareInput(ActivationQuantizer):
    """``ratio``: r, the share of the inputs that stays exact."""

    id: ClassVar[str] = "value-aware-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    ratio: Fraction = RATIO

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        sizes = observed.sample.float().abs()
        order = sizes.sort().values
        limit = order[max(0, len(order) - 1 - int(self.ratio * len(order) + 1e-9))] if len(order) else sizes.sum()
        if not bool(limit > 0):  # more zeros than the share of large values leaves: the grid spans all
            limit = observed.extremes.abs().max()
        low = -limit if signed else torch.zeros_like(limit)
        scale, zero = grid_for(low, limit, bits, symmetric=signed, narrow=True)
        return {"limit": limit.reshape(()), "scale": scale, "zero": zero + (2 ** (bits - 1) if signed else 0)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        coarse = fake_quantize(x, a.state["scale"], a.state["zero"], a.bits)
        return torch.where(x.abs() > a.state["limit"], x, coarse)
