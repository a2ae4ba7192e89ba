r"""Depthwise separable: each input channel gets its own kernel, then 1x1 mixes them.

Paper    Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam. MobileNets: Efficient Convolutional Neural
         Networks for Mobile Vision Applications. 2017. arXiv:1704.04861
Formula  w[o, i, :, :] ~ sum_m p[o, i, m] d[i, m, :, :],  the truncated SVD of each slice w[:, i];   m <= multiplier
Departs  Linear between the two unless norm and an activation are asked for, so that slices of that rank are met
         exactly (Guo et al., Network Decoupling, arXiv:1808.05517); the paper has a batch norm and a ReLU there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import slices
from espalier.compact.parts import Activation, Block, Layer, Spec, between, convs, needs_kernel, put, row
from espalier.core.fields import Channels


@dataclass(frozen=True, kw_only=True)
class DepthwiseSeparable(Block):
    """``multiplier``: kernels for each input channel."""

    id: ClassVar[str] = "depthwise-separable"
    multiplier: Channels = 1
    activation: Activation = "none"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        if layer.kernel and layer.groups == layer.inputs > 1:
            return "it has a kernel for each input channel already"
        return needs_kernel(layer, groups=True)

    def spec(self, layer: Layer) -> Spec:
        middle, active = layer.inputs * self.multiplier, self.activation != "none"
        return row(
            layer.conv(layer.inputs, middle, groups=layer.inputs, bias=active and not self.norm),
            between(layer, middle, self.activation, norm=self.norm),
            layer.pointwise(middle, layer.outputs, bias=active or layer.bias, groups=layer.groups),
        )

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        depthwise, pointwise = convs(block)
        parts = [slices(part.flatten(2), self.multiplier) for part in weight.chunk(layer.groups)]
        put(depthwise, torch.cat([kernels for kernels, _ in parts]))
        put(pointwise, torch.cat([mixing.flatten(1) for _, mixing in parts]), bias)
