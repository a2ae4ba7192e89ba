r"""Quantization-aware training: the grid follows the weights and the inputs while the network trains on it.

Paper    Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference.
         CVPR 2018. arXiv:1712.05877 (section 3); Krishnamoorthi 2018, arXiv:1806.08342 (per channel, symmetric)
Formula  weights: low = min w, high = max w at every step, codes 1..2^b - 1, so that -2^{b-1} never occurs in int8;
         inputs: low <- d low + (1 - d) min x, high likewise;   s = (high - low) / (codes - 1), zero is a code
Departs  Weights have a range for each output channel unless per=tensor, which is the paper's; pruned weights do not
         count. The averages start at the range of the calibration, not at nothing. Batch norms are not folded while
         training, and biases stay in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.fields import Count, Fraction
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine, by_channel
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY, Grid, fake_quantize, grid_for, straight_through


def weight_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    """``(scale, zero, first code, last code)`` of a range: 2^b - 1 codes, one of them zero. Shapes as ``low``."""
    if symmetric:
        half = 2 ** (bits - 1) - 1
        return *grid_for(low, high, bits, symmetric=True), -half, half
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale = (high - low) / (2**bits - 2)
    scale = torch.where(scale > TINY, scale, 1.0)
    zero = torch.round(1 - low / scale).clamp(1, 2**bits - 1).to(torch.int32)
    return scale, zero, 1, 2**bits - 1


@dataclass(frozen=True, kw_only=True)
class QAT(WeightQuantizer):
    """Weights on a grid over their range as it is now, of each output channel or of the tensor, as ``per`` says."""

    id: ClassVar[str] = "qat"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    symmetric: bool = False
    per: Literal["tensor", "channel"] = "channel"

    def scales(self, w: Weight) -> tuple[Tensor, Tensor, int, int]:
        """``(scale, zero, first code, last code)``; scale and zero are () or (channels,)."""
        latent = w.latent.detach()
        seen = latent if w.kept is None else torch.where(w.kept, latent, 0)  # zero lies in every range
        rows = by_channel(seen, w.axis if self.per == "channel" else None)
        scale, zero, first, last = weight_grid(*rows.aminmax(dim=1), w.bits, symmetric=self.symmetric)
        shape = scale.shape if self.per == "channel" and w.axis is not None else ()
        return scale.reshape(shape), zero.reshape(shape), first, last

    def grid(self, w: Weight) -> Grid:
        """The grid of the weights as they are now."""
        scale, zero, first, last = self.scales(w)
        return Grid(w.channels(scale), w.channels(zero), first, last)

    def quantize(self, w: Weight) -> Tensor:
        return straight_through(w.latent, self.grid(w).nearest(w.latent.detach()))

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        scale, zero, _, _ = self.scales(w)
        return affine(w, values, self.grid(w).codes(w.latent), scale, zero)


@dataclass(frozen=True, kw_only=True)
class QATInput(ActivationQuantizer):
    """Inputs on a grid whose range follows the batches in training and stays in eval mode.

    ``decay``: what stays of the range at each batch. ``delay``: so many batches of the training are not quantized (the
    paper waits for 50,000 to 2 million steps when it trains from scratch).
    """

    id: ClassVar[str] = "qat-input"
    decay: Fraction = 0.999
    delay: Count = 0

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        low, high = torch.tensor(observed.low), torch.tensor(observed.high)
        scale, zero = grid_for(low, high, bits, symmetric=False)
        return {"low": low, "high": high, "scale": scale, "zero": zero, "batches": torch.zeros((), dtype=torch.int64)}

    def follow(self, x: Tensor, a: Input) -> None:
        """Move the range towards that of ``x``, and the grid with it."""
        state = a.state
        for name, seen in zip(("low", "high"), x.float().aminmax(), strict=True):
            state[name].lerp_(seen.to(state[name]), 1 - self.decay)
        scale, zero = grid_for(state["low"], state["high"], a.bits, symmetric=False)
        state["scale"].copy_(scale)
        state["zero"].copy_(zero)
        state["batches"].add_(1)

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        if a.training and x.numel():
            with torch.no_grad():
                self.follow(x, a)
            if int(a.state["batches"]) <= self.delay:
                return x
        return fake_quantize(x, a.state["scale"], a.state["zero"], a.bits)
