r"""LR-nets: a distribution over ternary or binary values for every weight; outputs are drawn as normal in training.

Paper    Shayer, Levi, Fetaya. Learning Discrete Weights Using the Local Reparameterization Trick. ICLR 2018.
         arXiv:1710.07739
Formula  ternary: P(0) = sigma(a), P(1) = sigma(b) (1 - P(0)), P(-1) = (1 - sigma(b)) (1 - P(0));
         binary: P(1) = sigma(a), P(-1) = 1 - sigma(a);
         m = sum x E[w], v = sum x^2 Var[w], y = m + sqrt(v + eps) N(0, 1);
         at first, with u = w / std in [-1, 1]: P(0) = 0.95 - 0.9 |u|, sigma(b) = (1 + u / (1 - P(0))) / 2, or
         binary P(1) = (1 + u) / 2, both in [0.05, 0.95];   penalty: decay / 2 sum (a^2 + b^2), or beta sum P(1) P(-1)
Departs  The values are multiplied by std(w), fixed, so that networks without batch norm keep their scale. The most
         likely values are used after training; the paper draws them. Layers other than Linear, Conv1d and Conv2d draw
         normal weights in training, one draw for the whole batch, in place of normal outputs. So does, from the second
         step on, a layer whose weight is used without a call of the layer, such as the output projection of torch's
         attention. Batch norm has seen drawn outputs: it is best re-estimated by a step of its own after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.callback import Loop
from espalier.core.fields import Penalty, Positive
from espalier.core.inputs import ActivationQuantizer, quantized_input
from espalier.core.parametrize import Slot, slots
from espalier.core.quantized import Weight, WeightQuantizer, affine
from espalier.core.representation import Representation
from espalier.quantize.grid import straight_through
from espalier.quantize.parts import computed_with
from espalier.quantize.xnor import XNORInput

if TYPE_CHECKING:
    from espalier.core.context import Context

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
UNSCALED = "lr-net draws outputs without the scale that xnor-input gives them; take binary-input for the inputs"
TINY = 1e-12


def spread_of(weight: Tensor, kept: Tensor | None) -> Tensor:
    """The standard deviation of the weights, () and float32; the mean size where they are all the same.

    Zeros do not count: among them are those that an earlier step pruned.
    """
    counted = weight.detach() != 0 if kept is None else (weight.detach() != 0) & kept
    values = weight.detach()[counted].double()
    found = values.std(correction=0) if values.numel() else values.new_zeros(())
    return (found if bool(found > TINY) else values.abs().sum() / max(1, values.numel())).float()


def logits(weight: Tensor, bits: int) -> Tensor:
    """The latent tensor for a weight that is normalised already: ``(2, *shape)``, or ``(1, *shape)`` for one bit."""
    w = weight.clamp(-1, 1)
    if bits == 1:
        return torch.logit(((1 + w) / 2).clamp(0.05, 0.95))[None]
    zero = 0.95 - 0.9 * w.abs()
    positive = ((1 + w / (1 - zero)) / 2).clamp(0.05, 0.95)
    return torch.stack([torch.logit(zero), torch.logit(positive)])


def probabilities(latent: Tensor) -> tuple[Tensor, Tensor]:
    """``(P(1), P(-1))`` of the weight's shape from ``(2, *shape)`` or ``(1, *shape)``."""
    if len(latent) == 1:
        return torch.sigmoid(latent[0]), torch.sigmoid(-latent[0])
    rest = torch.sigmoid(-latent[0])
    return torch.sigmoid(latent[1]) * rest, torch.sigmoid(-latent[1]) * rest


def moments(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the values -1, 0, 1."""
    plus, minus = probabilities(latent)
    mean = plus - minus
    return mean, plus + minus - mean.square()


def likeliest(latent: Tensor) -> Tensor:
    """The most likely value, -1, 0 or 1 (int8); of equally likely ones 0, then 1."""
    plus, minus = probabilities(latent.detach())
    signs = torch.where(minus > plus, -1, 1).to(torch.int8)
    if len(latent) == 1:
        return signs
    return signs.masked_fill(torch.maximum(plus, minus) <= 1 - plus - minus, 0)


@dataclass(frozen=True, kw_only=True)
class LrNet(WeightQuantizer):
    """``decay``: on ternary logits; ``beta``: on undecided binary weights; ``eps``: added to the variance."""

    id: ClassVar[str] = "lr-net"
    widths: ClassVar[tuple[int, ...]] = (1, 2)
    stacked: ClassVar[int] = 1
    decay: Penalty = 1e-11
    beta: Penalty = 1e-6
    eps: Positive = 1e-3

    def start(self, weight: Tensor, bits: int, axis: int | None, kept: Tensor | None) -> dict[str, Tensor]:
        flag = torch.zeros((), dtype=torch.bool, device=weight.device)
        return {"scale": spread_of(weight, kept), "done": flag, "draws": flag, "called": flag}

    def latent(self, weight: Tensor, bits: int) -> Tensor:
        scale = spread_of(weight, None)
        return logits(weight / torch.where(scale > 0, scale, 1.0).to(weight.dtype), bits)

    def refuses(self, slot: Slot) -> str | None:
        inputs = [quantized_input(module) for _, module, _ in slot.owners]
        reasons = (self.refuses_inputs(quantizer.method) for quantizer in inputs if quantizer is not None)
        return next((reason for reason in reasons if reason is not None), None)

    def refuses_inputs(self, method: ActivationQuantizer) -> str | None:
        return UNSCALED if isinstance(method, XNORInput) else None

    def quantize(self, w: Weight) -> Tensor:
        mean, variance = moments(w.latent)
        scale = w.state["scale"]
        mean = mean * scale.to(mean.dtype)
        if not w.training or bool(w.state["done"]):
            return straight_through(mean, (likeliest(w.latent).float() * scale).to(mean.dtype))
        if bool(w.state["draws"]):
            deviation = (variance.clamp_min(0) + TINY).sqrt() * scale.to(mean.dtype)
            return mean + deviation * torch.randn_like(mean)
        return mean

    def freeze(self, w: Weight, values: Tensor) -> Representation:
        zero = torch.zeros((), dtype=torch.int32, device=values.device)
        return affine(w, values, likeliest(w.latent), w.state["scale"], zero)

    def penalty(self, w: Weight) -> Tensor | None:
        if bool(w.state["done"]):
            return None
        if w.bits == 1:
            plus, minus = probabilities(w.latent)
            return self.beta * (plus * minus if w.kept is None else torch.where(w.kept, plus * minus, 0)).sum()
        squares = w.latent.square()
        return self.decay / 2 * (squares if w.kept is None else torch.where(w.kept, squares, 0)).sum()

    def on_start(self, w: Weight, loop: Loop) -> None:
        slot = slots(loop.model).get(w.name)
        own = slot is not None and slot.shape == w.latent.shape[1:]  # not a table of shared values
        responds = own and slot is not None and all(isinstance(module, LAYERS) for _, module, _ in slot.owners)
        w.state["draws"].logical_or_(torch.tensor(not responds, device=w.latent.device))

    def after_step(self, w: Weight, loop: Loop) -> None:
        w.state["draws"].logical_or_(~w.state["called"])  # nobody has passed through respond

    def respond(self, w: Weight, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if bool(w.state["draws"]) or bool(w.state["done"]) or not inputs:
            return output
        w.state["called"].fill_(True)
        x = computed_with(module, inputs[0])
        _, variance = moments(w.latent)
        variance = variance if w.kept is None else torch.where(w.kept, variance, 0)
        summed = _linear(module, x.square(), variance.to(x.dtype)).to(output.dtype)
        deviation = w.state["scale"].to(output.dtype) * (summed.clamp_min(0) + self.eps).sqrt()
        return output + deviation * torch.randn_like(output)

    def finish(self, w: Weight, context: Context) -> None:
        w.state["done"].fill_(True)


def _linear(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        summed: Tensor = module._conv_forward(x, weight, None)  # knows the padding modes
        return summed
    return F.linear(x, weight)
