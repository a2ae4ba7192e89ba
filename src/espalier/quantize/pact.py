r"""PACT: inputs clipped at a bound that is learned.

Paper    Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan. PACT: Parameterized Clipping Activation for
         Quantized Neural Networks. arXiv:1805.06085
Formula  y = clip(x, 0, a);   y^ = round(y (2^b - 1) / a) a / (2^b - 1);   dy^/da = 1 where x >= a, else 0;
         dy^/dx = 1 where 0 < x < a, else 0;   loss + lambda/2 a^2, one a for a layer
Departs  Inputs with a sign, which the paper does not have after a ReLU, are clipped to [-a, a] on 2^b - 1 values around
         zero, dy^/da = sign(x) outside. A bound that an optimizer step takes below zero is turned positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.fields import Penalty, Positive
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.quantize.grid import TINY, Grid, fake_quantize


class Clipped(torch.autograd.Function):
    """``x`` clipped to ``low * scale .. high * scale`` and rounded, ``scale = alpha / high``; gradients as in eq. 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = low < 0
        scale = alpha.float() / high
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), low, high).nearest(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, alpha = ctx.saved_tensors
        above, below = x.float() >= alpha, x.float() <= (-alpha if ctx.signed else 0)
        slope = above.float() - below.float() if ctx.signed else above.float()
        return torch.where(above | below, 0, grads[0]), (grads[0].float() * slope).sum().to(alpha.dtype), None, None


def clipped(x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
    """See :class:`Clipped`; ``alpha``: 0-D, positive."""
    return Clipped.apply(x, alpha, low, high)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True, kw_only=True)
class PACT(ActivationQuantizer):
    """``alpha``: the bound to begin with; None for the largest value of the calibration. ``strength``: lambda.

    The optimizer's own weight decay leaves alpha alone.
    """

    id: ClassVar[str] = "pact"
    widths: ClassVar[tuple[int, ...]] = tuple(range(2, 17))
    alpha: Positive | None = 10.0
    strength: Penalty = 2e-4

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        largest = max(-observed.low, observed.high)
        alpha = self.alpha if self.alpha is not None else largest if largest > TINY else 1.0
        zero = 2 ** (bits - 1) if signed else 0
        return {"alpha": nn.Parameter(torch.tensor(float(alpha))), "zero": torch.tensor(zero, dtype=torch.int32)}

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        alpha, high = a.state["alpha"], 2**a.bits - 1 - a.middle
        if a.training:
            return clipped(x, alpha, -high if a.signed else 0, high)
        alpha = alpha.detach()  # torch's operator takes no step that is learned
        if a.signed:
            x = torch.clamp(x, -alpha, alpha)
        return fake_quantize(x, alpha / high, a.state["zero"], a.bits)

    def penalty(self, a: Input) -> Tensor | None:
        return self.strength / 2 * a.state["alpha"].square()

    def after_step(self, a: Input, loop: Loop) -> None:
        a.state["alpha"].abs_().clamp_(min=TINY)
