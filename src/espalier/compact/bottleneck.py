r"""Bottleneck: 1x1 to fewer channels, the kernel there, 1x1 back.

Paper    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385 (figure 5)
Formula  1x1, I -> min(R, I);   k x k, -> min(R, O);   1x1, -> O;   R = width * max(I, O)
Departs  It stands for one layer, without a shortcut of its own, and is linear inside unless an activation is asked for.
         It starts from the singular vectors of the trained weight over its inputs and its outputs. A linear layer or a
         1x1 convolution becomes two, R = width * min(I, O).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import channel_basis
from espalier.compact.parts import Activation, Block, Layer, Spec, between, convs, put, row
from espalier.core.fields import Positive


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Block):
    """``width``: channels inside, as a share of the larger side."""

    id: ClassVar[str] = "bottleneck"
    width: Positive = 0.25
    activation: Activation = "none"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        return f"its {layer.groups} groups cannot be kept by the block" if layer.groups > 1 else ""

    def widths(self, layer: Layer) -> tuple[int, int]:
        """Channels after the first 1x1, and before the last."""
        flat = layer.taps == 1
        side = min(layer.inputs, layer.outputs) if flat else max(layer.inputs, layer.outputs)
        width = max(1, round(self.width * side))
        one = min(width, layer.inputs)
        return (min(one, layer.outputs),) * 2 if flat else (one, min(width, layer.outputs))

    def spec(self, layer: Layer) -> Spec:
        (one, two), active = self.widths(layer), self.activation != "none"
        inner = active and not self.norm
        last = active or layer.bias
        if layer.taps == 1:
            first = layer.pointwise(layer.inputs, one) if not layer.kernel else layer.conv(layer.inputs, one)
            if inner:
                first["args"]["bias"] = True
            return row(first, between(layer, one, self.activation, norm=self.norm),
                       layer.pointwise(two, layer.outputs, bias=last))  # fmt: skip
        padding, rest = layer.ends(self.activation)
        return row(
            layer.pointwise(layer.inputs, one, bias=inner, padding=padding),
            between(layer, one, self.activation, norm=self.norm),
            rest.conv(one, two, bias=inner), between(layer, two, self.activation, norm=self.norm),
            layer.pointwise(two, layer.outputs, bias=last),
        )  # fmt: skip

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        one, two = self.widths(layer)
        outer = channel_basis(weight, two, 0)
        layers = convs(block)
        core = torch.einsum("oi...,or->ri...", weight, outer)
        if layer.taps > 1:
            inner = channel_basis(weight, one, 1)
            put(layers[0], inner.T)
            core = torch.einsum("ri...,is->rs...", core, inner)
        put(layers[-2], core)
        put(layers[-1], outer, bias)
