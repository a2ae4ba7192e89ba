r"""Stochastic ternary weights: zero or plus-minus s by chance, right in the mean.

Paper    Lin, Courbariaux, Memisevic, Bengio. Neural Networks with Few Multiplications. ICLR 2016. arXiv:1510.03009
Formula  w^ = s sign(w) B, B ~ Bernoulli(|w| / s), so that E[w^] = w;   s = 1 (TernaryConnect), Glorot's, or max|w|;
         dL/dw = dL/dw^;   w <- clip(w, -s, s) after every step;
         quantized back-propagation: dL/dW = sum of e q(x)^T, q(x) = sign(x) 2^k, k = floor(log2|x|), or k + 1 with
         probability |x| / 2^k - 1, so that E[q(x)] = x
Departs  The paper tests with the real weights, which would not be ternary: here the network is judged and stored with
         the nearer level (B = 1 for |w| > s/2), or with one draw that is fixed when training starts. Training starts
         from the trained weight, as s clip(w / c, -1, 1), c Glorot's, and s = c is the default. max|w|, of the kept
         weights, is renewed after every step and clips nothing. Quantized back-propagation is for Linear and
         convolution layers, others take x itself; the exponents are not limited to a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.core.callback import Loop
from espalier.core.quantized import Weight, WeightQuantizer
from espalier.core.representation import Representation
from espalier.quantize.parts import computed_with
from espalier.quantize.ternary import fixed_scale, scaled, stored, within


def bernoulli_codes(weight: Tensor, scale: Tensor, draw: Tensor) -> Tensor:
    """sign(w) where ``draw`` (uniform in [0, 1), the weight's shape or one number) is below |w| / s, else 0."""
    weight = weight.float()
    return torch.where(draw * scale < weight.abs(), weight.sign(), 0.0)


def power_of_two(x: Tensor, draw: Tensor) -> Tensor:
    """``x`` at one of its two neighbouring powers of two, the mean of both being x; zero stays. ``draw``: in [0, 1)."""
    fraction, exponent = torch.frexp(x)  # |fraction| in [1/2, 1): the lower power is half of 2**exponent
    upper = draw < 2 * fraction.abs() - 1
    return torch.where(x == 0, x, torch.ldexp(x.sign(), exponent - 1 + upper.to(exponent.dtype)))


def largest(weight: Tensor, kept: Tensor | None) -> Tensor:
    """max|w| over the kept weights as float32, shape (); 1 where all are zero."""
    magnitude = weight.detach().abs().float()
    if kept is not None:
        magnitude = torch.where(kept, magnitude, 0.0)
    found = magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())
    return torch.where(found > 0, found, 1.0)


@dataclass(frozen=True, kw_only=True)
class TernaryBernoulli(WeightQuantizer):
    """``evaluate``: what is judged and stored. ``backward``: the inputs in the product that gives the weight gradient.

    ``evaluate=draw`` keeps the nearer level until a training starts.
    """

    id: ClassVar[str] = "ternary-bernoulli"
    widths: ClassVar[tuple[int, ...]] = (2,)
    scale: Literal["one", "glorot", "max"] = "glorot"
    evaluate: Literal["nearest", "draw"] = "nearest"
    backward: Literal["full", "power-of-two"] = "full"

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        scale = largest(weight, kept) if self.scale == "max" else fixed_scale(weight, self.scale)
        if self.evaluate == "nearest":
            return {"scale": scale}
        return {"scale": scale, "draw": torch.full(weight.shape, 0.5, device=weight.device)}

    def latent(self, weight: Tensor, bits: int) -> Tensor:
        return weight if self.scale == "max" else within(weight, self.scale)

    def on_start(self, w: Weight, loop: Loop) -> None:
        if self.evaluate == "draw":  # from the name, so that a resumed training has the same
            chance = loop.context.generator(f"draw of {w.name}")
            w.state["draw"].copy_(torch.rand(w.latent.shape, generator=chance))

    def codes(self, w: Weight) -> Tensor:
        """-1, 0, 1: drawn anew in training, else by the fixed draw."""
        if w.training:
            draw = torch.rand_like(w.latent, dtype=torch.float32)
        else:
            draw = w.state["draw"] if self.evaluate == "draw" else torch.tensor(0.5, device=w.latent.device)
        return bernoulli_codes(w.latent.detach(), w.state["scale"], draw)

    def quantize(self, w: Weight) -> Tensor:
        return scaled(w.latent, self.codes(w), w.state["scale"])

    def after_step(self, w: Weight, loop: Loop) -> None:
        if self.scale == "max":
            w.state["scale"].copy_(largest(w.latent, w.kept))
        else:
            limit = float(w.state["scale"])
            w.latent.clamp_(-limit, limit)

    def respond(self, w: Weight, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The same output; the weight gradient sees q(x) in place of x, the gradient of x stays."""
        linear, convolution = isinstance(module, nn.Linear), isinstance(module, _ConvNd)
        known = linear or (convolution and not isinstance(module, _ConvTransposeNd))
        if self.backward == "full" or not known or not torch.is_grad_enabled():
            return output
        with torch.no_grad():
            x = computed_with(module, inputs[0])
            change = power_of_two(x, torch.rand_like(x, dtype=torch.float32)) - x
        weight = module.weight
        assert isinstance(weight, Tensor)  # noqa: S101 - of a layer known above
        apply = F.linear if linear else module._conv_forward
        extra: Tensor = apply(change, weight, None)  # type: ignore[operator]
        return output + (extra - extra.detach())

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        return stored(w, values, self.codes(w), w.state["scale"])
