r"""ELQ: portion by portion to binary or ternary, the rest trained against the loss that quantizing would cost.

Paper    Zhou, Yao, Wang, Chen. Explicit Loss-Error-Aware Quantization for Low-Bit Deep Neural Networks. CVPR 2018
Formula  min L(w) + a1 |L(w) - L(w^)| + a2 / 2 |w - w^|^2,   L(w) - L(w^) ~ <g, w - w^>, g = dL/dw;
         w <- w - lr [g + a1 sgn(<g, w - w^>) g + a2 (w - w^)] T;   T = 0 where w is quantized, as in INQ;
         w^ = c sgn(w), c = <|w|>;   or c {0, +-1} with 0 below 0.7 <|w|>, c = <|w|> of the others
Departs  g is the gradient of the network in force (quantized portions and the others in floating point) and held
         constant in the loss term; the paper's expansion needs a second pass at w^. The constants a1, a2, the ternary
         threshold (that of TWN), one c for the layer from the weights at the start, and INQ's portions for two bits
         are ours: none could be checked against the paper's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.fields import Penalty
from espalier.core.quantized import Weight, affine, mean_where
from espalier.core.representation import Representation
from espalier.quantize.inq import Incremental

THRESHOLD = 0.7


def constants(weight: Tensor, bits: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(c, threshold)`` of a weight, both () and float32; one bit has no threshold."""
    sizes = weight.detach().abs().float()
    mean = mean_where(sizes, kept, None)
    if bits == 1:
        return mean, torch.zeros_like(mean)
    large = sizes >= THRESHOLD * mean
    return mean_where(sizes, large if kept is None else large & kept, None), THRESHOLD * mean


def to_signs(weight: Tensor, c: Tensor, threshold: Tensor) -> Tensor:
    """``c sgn(w)`` where ``|w| >= threshold``, else 0, in the weight's dtype; ``sgn(0) = 1``."""
    signs = torch.where(weight.detach() < 0, -c, c)
    return torch.where(weight.detach().abs().float() >= threshold, signs, 0).to(weight.dtype)


def perturbed(gradient: Tensor, error: Tensor, a1: float, a2: float) -> Tensor:
    """The gradient of the whole objective; ``error = w - w^``, zero where it does not count."""
    return gradient + a1 * torch.sign((gradient * error).sum()) * gradient + a2 * error


@dataclass(frozen=True, kw_only=True)
class Elq(Incremental):
    """``loss_weight``: a1, ``error_weight``: a2 of the formula."""

    id: ClassVar[str] = "elq"
    widths: ClassVar[tuple[int, ...]] = (1, 2)
    loss_weight: Penalty = 0.1
    error_weight: Penalty = 1e-4

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        c, threshold = constants(weight, bits, kept)
        return {**super().start(weight, bits, axis, kept), "c": c, "threshold": threshold}

    def project(self, w: Weight) -> Tensor:
        return to_signs(w.latent, w.state["c"], w.state["threshold"])

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        zero = torch.zeros((), dtype=torch.int32, device=values.device)
        return affine(w, values, torch.sign(values).to(torch.int32), w.state["c"], zero)

    def before_step(self, w: Weight, loop: Loop) -> None:
        gradient = w.latent.grad
        if gradient is not None:
            off = w.state["fixed"] if w.kept is None else w.state["fixed"] | ~w.kept
            error = (w.latent - self.project(w)).masked_fill(off, 0)
            gradient.copy_(perturbed(gradient, error, self.loss_weight, self.error_weight).masked_fill(off, 0))
