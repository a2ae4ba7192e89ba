r"""Trained ternary quantization: two magnitudes for each layer, learned with the weights.

Paper    Zhu, Han, Mao, Dally. Trained Ternary Quantization. ICLR 2017. arXiv:1612.01064
Formula  w^ = W_p for w > D, -W_n for w < -D, else 0;   D = t max|w|, t = 0.05, or so that a share r is zero;
         dL/dW_p = sum of g over w > D,   dL/dW_n = -sum of g over w < -D,   g = dL/dw^;
         dL/dw = W_p g for w > D,   g for |w| <= D,   W_n g for w < -D
Departs  The paper divides the weights by max|w| first and prints dL/dW_n without its minus; its code does neither.
         W_p and W_n start at the mean magnitude of the weights that they stand for (``init=one``: at 1, as in the
         authors' code) and are trained in units of that, so that a learning rate does to them what it does from 1: in
         front of a batch norm their gradient is the larger the smaller they are. A learned threshold is an addition: t
         is trained by the slope of the ramp clip(|w| / 2D, 0, 1) in the place of the step 1[|w| > D], the sum over the
         n weights divided by sqrt(n). D follows the latent weights after every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.fields import Fraction, Sparsity
from espalier.core.quantized import Weight, WeightQuantizer

SIDES = ("positive", "negative")
"""W_p and W_n, each in its unit."""
SMALLEST = 1e-3
"""Below which a learned factor does not fall: a threshold of zero would have no slope."""


class Trained(torch.autograd.Function):
    """The ternary weight, with the paper's gradients for the latent weight, W_p and W_n, and the ramp's for D."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, positive: Tensor, negative: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(latent, positive, negative, threshold)
        weight = latent.float()
        values = torch.where(weight > threshold, positive, torch.where(weight < -threshold, -negative, 0.0))
        return values.to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        latent, positive, negative, threshold = ctx.saved_tensors
        weight, g = latent.float(), grads[0].float()
        above, below = weight > threshold, weight < -threshold
        for_latent = g * torch.where(above, positive, torch.where(below, negative, 1.0))
        for_positive = torch.where(above, g, 0.0).sum()
        for_negative = -torch.where(below, g, 0.0).sum()
        for_threshold = None
        if ctx.needs_input_grad[3]:
            ramp = weight.abs() < 2 * threshold
            height = torch.where(weight > 0, positive, -negative)
            slope = torch.where(ramp, -height * weight.abs() / (2 * threshold.square()), 0.0)
            for_threshold = (g * slope).sum() / weight.numel() ** 0.5
        return for_latent.to(latent.dtype), for_positive, for_negative, for_threshold


def kept_magnitudes(weight: Tensor, kept: Tensor | None) -> Tensor:
    """|w| of the kept weights, 1-D float32."""
    magnitudes = weight.detach().float().abs()
    return magnitudes.reshape(-1) if kept is None else magnitudes[kept]


def threshold_of(magnitudes: Tensor, rule: str, factor: float, sparsity: float) -> Tensor:
    """D: a share of the largest magnitude, or the magnitude of the last of the ``sparsity`` share of weights."""
    if not magnitudes.numel():
        return magnitudes.new_zeros(())
    if rule == "sparsity":
        count = int(sparsity * magnitudes.numel())
        return magnitudes.kthvalue(count).values if count else magnitudes.new_zeros(())
    return factor * magnitudes.amax()


@dataclass(frozen=True, kw_only=True)
class TTQ(WeightQuantizer):
    """``threshold``: t max|w| with ``factor`` t, a fixed ``sparsity``, or t learned from ``factor`` on.

    ``init``: W_p and W_n to begin with, as in ternary weight networks (the means of both sides) or 1.
    """

    id: ClassVar[str] = "ttq"
    widths: ClassVar[tuple[int, ...]] = (2,)
    threshold: Literal["factor", "sparsity", "learned"] = "factor"
    factor: Fraction = 0.05
    sparsity: Sparsity = 0.5
    init: Literal["twn", "one"] = "twn"

    def conflicts(self) -> list[str]:
        """A threshold that is learned needs a place to start."""
        wrong = self.threshold == "learned" and self.factor < SMALLEST
        return [f"a learned threshold starts at factor={SMALLEST:g} at least"] if wrong else []

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        magnitudes = kept_magnitudes(weight, kept)
        threshold = threshold_of(magnitudes, self.threshold, self.factor, self.sparsity)
        signed = weight.detach().float()
        inside = torch.ones_like(signed, dtype=torch.bool) if kept is None else kept
        means = torch.stack([_mean_beyond(side[inside], threshold, magnitudes) for side in (signed, -signed)])
        units = means if self.init == "twn" else torch.ones_like(means)
        ones = (nn.Parameter(torch.ones_like(threshold)) for _ in range(2))
        state: dict[str, Tensor] = {**dict(zip(SIDES, ones, strict=True)), "units": units}
        if self.threshold != "learned":
            return state | {"threshold": threshold}
        factor = nn.Parameter(torch.full_like(threshold, self.factor))
        return state | {"factor": factor, "largest": threshold_of(magnitudes, "factor", 1.0, 0.0)}

    def quantize(self, w: Weight) -> Tensor:
        state = w.state
        threshold = state["factor"] * state["largest"] if self.threshold == "learned" else state["threshold"]
        positive, negative = (state[name] * unit for name, unit in zip(SIDES, state["units"], strict=True))
        made: Tensor = Trained.apply(w.latent, positive, negative, threshold)  # type: ignore[no-untyped-call]
        return made

    def after_step(self, w: Weight, loop: Loop) -> None:
        magnitudes = kept_magnitudes(w.latent, w.kept)
        if self.threshold == "learned":
            w.state["factor"].clamp_(SMALLEST, 1.0)
            w.state["largest"].copy_(threshold_of(magnitudes, "factor", 1.0, 0.0))
        else:
            w.state["threshold"].copy_(threshold_of(magnitudes, self.threshold, self.factor, self.sparsity))


def _mean_beyond(side: Tensor, threshold: Tensor, magnitudes: Tensor) -> Tensor:
    """The mean of the entries above ``threshold``; without any, of all ``magnitudes``; 1 where there is none."""
    beyond = side[side > threshold]
    for values in (beyond, magnitudes):
        if values.numel() and bool(values.any()):
            return values.mean()
    return torch.ones_like(threshold)
