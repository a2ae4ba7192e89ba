r"""Learned step size: the step of the grid is trained with the weights, by the gradient of the loss.

Paper    Esser, McKinstry, Bablani, Appuswamy, Modha. Learned Step Size Quantization. ICLR 2020. arXiv:1902.08153;
         LSQ+: Bhalgat, Lee, Nagel, Blankevoort, Kwak. CVPR Workshops 2020. arXiv:2004.09576
Formula  v^ = s round(clip(v / s, -Q_N, Q_P));   signed: Q_N = 2^{b-1}, Q_P = 2^{b-1} - 1, else 0 and 2^b - 1;
         dv^/ds = round(v / s) - v / s inside, -Q_N or Q_P outside, times 1 / sqrt(N Q_P);   dv^/dv = 1 inside, else 0;
         s starts at 2 mean|v| / sqrt(Q_P).   plus: inputs v^ = s round(clip((v - o) / s, 0, 2^b - 1)) + o,
         dv^/do = 0 inside, 1 outside; weights start at s = max(|mean - 3 std|, |mean + 3 std|) / 2^{b-1}
Departs  Pruned weights count in no statistic. A step that an optimizer step takes below zero is turned positive. In
         LSQ+ step and offset of inputs start where a search over ranges finds the smallest squared error, where the
         paper minimises it by gradient, and the gradient of the offset has the factor of that of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.core.quantized import Weight, WeightQuantizer, affine, mean_where
from espalier.core.representation import Representation
from espalier.quantize.grid import TINY, Grid, fake_quantize
from espalier.quantize.mse import Mse


class Stepped(torch.autograd.Function):
    """``s * round(clip(v / s, low, high))`` with the gradients of eqs. 3 and 5, that of ``s`` times ``factor``."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, low: int, high: int, factor: Tensor | float) -> Tensor:
        ctx.save_for_backward(v, scale)
        ctx.low, ctx.high, ctx.factor = low, high, factor
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), low, high).nearest(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        v, scale = ctx.saved_tensors
        scaled = v.float() / scale
        inside = (scaled > ctx.low) & (scaled < ctx.high)
        slope = torch.where(inside, torch.round(scaled) - scaled, scaled.clamp(ctx.low, ctx.high))
        total = (grads[0].float() * slope).sum_to_size(scale.shape)
        return torch.where(inside, grads[0], 0), (total * ctx.factor).to(scale.dtype), None, None, None


class Shifted(torch.autograd.Function):
    """``v - offset``; the offset's own gradient is times ``factor``."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, offset: Tensor, sign: int, factor: float) -> Tensor:
        ctx.sign, ctx.factor = sign, factor
        return (v + sign * offset).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grads[0], grads[0].float().sum() * (ctx.sign * ctx.factor), None, None


def stepped(v: Tensor, scale: Tensor, low: int, high: int, factor: Tensor | float) -> Tensor:
    """``v`` on the grid of step ``scale``; see :class:`Stepped`."""
    return Stepped.apply(v, scale, low, high, factor)  # type: ignore[no-untyped-call, no-any-return]


def shifted(v: Tensor, offset: Tensor, sign: int, factor: float) -> Tensor:
    """``v + sign * offset``; see :class:`Shifted`."""
    return Shifted.apply(v, offset, sign, factor)  # type: ignore[no-untyped-call, no-any-return]


def first_step(mean_size: Tensor, highest: int) -> Tensor:
    """2 mean|v| / sqrt(Q_P); 1 where all is zero."""
    return _usable(2 * mean_size.float() / math.sqrt(highest))


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale > TINY, scale, 1.0)


def keep_positive(scale: Tensor) -> None:
    """Turn a step that went below zero, in place."""
    scale.abs_().clamp_(min=TINY)


@dataclass(frozen=True, kw_only=True)
class LSQ(WeightQuantizer):
    """``per``: one step for the tensor, as in the paper, or for each output channel. ``plus``: LSQ+."""

    id: ClassVar[str] = "lsq"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    per_channel: ClassVar[frozenset[str]] = frozenset({"scale"})
    per: Literal["tensor", "channel"] = "tensor"
    plus: bool = False

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        axis = axis if self.per == "channel" else None
        values = weight.float()
        if not self.plus:
            return {"scale": nn.Parameter(first_step(mean_where(values.abs(), kept, axis), 2 ** (bits - 1) - 1))}
        mean = mean_where(values, kept, axis)
        centre = mean if axis is None else mean.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        deviation = mean_where((values - centre).square(), kept, axis).sqrt()
        return {"scale": nn.Parameter(_usable((mean.abs() + 3 * deviation) / 2 ** (bits - 1)))}

    def quantize(self, w: Weight) -> Tensor:
        scale, half = w.state["scale"], 2 ** (w.bits - 1)
        count = w.latent.numel() if w.kept is None else int(w.kept.sum())
        each = max(1.0, count / max(1, scale.numel()))
        return stepped(w.latent, w.channels(scale), -half, half - 1, 1 / math.sqrt(each * (half - 1)))

    def after_step(self, w: Weight, loop: Loop) -> None:
        keep_positive(w.state["scale"])

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        scale, half = w.state["scale"].detach(), 2 ** (w.bits - 1)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        codes = Grid(w.channels(scale), w.channels(zero), -half, half - 1).codes(w.latent)
        return affine(w, values, codes, scale, zero)


@dataclass(frozen=True, kw_only=True)
class LSQInput(ActivationQuantizer):
    """Inputs with a learned step; ``plus``: and a learned offset, which takes the place of a sign."""

    id: ClassVar[str] = "lsq-input"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    plus: bool = False

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        top, zero = 2**bits - 1, 0
        if self.plus:
            base = max(observed.low, 0.0) + min(observed.high, 0.0)  # the grid need not hold zero
            rows, extremes = observed.sample.float()[None] - base, observed.extremes.float()[None] - base
            low, high = Mse().range(rows, extremes, bits, symmetric=False)
            scale, offset = _usable((high - low) / top)[0], low[0] + base
            tensors: dict[str, Tensor] = {"scale": nn.Parameter(scale), "offset": nn.Parameter(offset)}
        else:
            zero = 2 ** (bits - 1) if signed else 0
            mean = observed.sample.float().abs().mean()
            tensors = {"scale": nn.Parameter(first_step(mean, top - zero))}
        return {**tensors, "zero": torch.tensor(zero, dtype=torch.int32)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        scale, top, middle = a.state["scale"], 2**a.bits - 1, 0 if self.plus else a.middle
        if not a.training:
            fixed, zero = scale.detach(), a.state["zero"]  # torch's operator takes no step that is learned
            if not self.plus:
                return fake_quantize(x, fixed, zero, a.bits)
            offset = a.state["offset"].detach()
            return fake_quantize(x - offset, fixed, zero, a.bits) + offset
        features = max(1, x[0].numel() if x.ndim > 1 and len(x) else x.numel())
        factor = 1 / math.sqrt(features * (top - middle))
        if not self.plus:
            return stepped(x, scale, -middle, top - middle, factor)
        offset = a.state["offset"]
        return shifted(stepped(shifted(x, offset, -1, factor), scale, 0, top, factor), offset, 1, factor)

    def after_step(self, a: Input, loop: Loop) -> None:
        keep_positive(a.state["scale"])
