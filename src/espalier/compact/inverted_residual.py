r"""Inverted residual: 1x1 to more channels, a kernel for each, 1x1 back, and a shortcut around.

Paper    Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. CVPR 2018.
         arXiv:1801.04381
Formula  y = [x +] p(act(d(act(e(x)))));   e: I -> t I, d: one kernel for each, p: t I -> O, linear
Departs  t = 2, where the paper has 6: between equal ends 6 is larger than a 3x3 convolution. The shortcut is off
         unless asked for, as the layer it stands for has none. No batch norms unless asked for. It starts from the
         CP-3 decomposition of the trained weight (less the identity where there is a shortcut), scaled and shifted so
         that ReLU6 lets it through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import canonical
from espalier.compact.parts import (
    Activation,
    Block,
    Layer,
    Spec,
    between,
    convs,
    needs_kernel,
    put,
    residual,
    row,
    unit_kernel,
)
from espalier.core.fields import Positive


@dataclass(frozen=True, kw_only=True)
class InvertedResidual(Block):
    """``expansion``: t. ``shortcut``: x is added where size and channels stay."""

    id: ClassVar[str] = "inverted-residual"
    expansion: Positive = 2.0
    shortcut: bool = False
    activation: Activation = "relu6"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        return needs_kernel(layer)

    def middle(self, layer: Layer) -> int:
        """t I."""
        return max(1, round(self.expansion * layer.inputs))

    def spec(self, layer: Layer) -> Spec:
        middle, active = self.middle(layer), self.activation != "none"
        inner = active and not self.norm
        padding, rest = layer.ends(self.activation)
        found = row(
            layer.pointwise(layer.inputs, middle, bias=inner, padding=padding),
            between(layer, middle, self.activation, norm=self.norm),
            rest.conv(middle, middle, groups=middle, bias=inner),
            between(layer, middle, self.activation, norm=self.norm),
            layer.pointwise(middle, layer.outputs, bias=active or layer.bias),
        )  # fmt: skip
        return row(residual(found)) if self.shortcut and layer.same else found

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        expand, depthwise, project = convs(block)
        if self.shortcut and layer.same:
            weight = weight - unit_kernel(layer, weight)
        outer, inner, kernels = canonical(weight.flatten(2), self.middle(layer))
        put(expand, inner.T)
        put(depthwise, kernels.T)
        put(project, outer, bias)
