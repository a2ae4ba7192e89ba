r"""Stacked 3x3: a large kernel as several of 3x3 in a row, which see the same field.

Paper    Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015.
         arXiv:1409.1556 (section 2.3)
Formula  k x k, I -> O, k odd, becomes (k - 1) / 2 convolutions of 3x3, I -> M -> ... -> O;   M = width * O
Departs  Linear between them unless an activation is asked for. All padding stands before the first and the stride at
         the last, so that without an activation the stack is the large kernel, borders included. It starts from the
         trained weight by alternating least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import stacked
from espalier.compact.parts import Activation, Block, Layer, Spec, between, convs, needs_kernel, put, row
from espalier.core.fields import Positive


@dataclass(frozen=True, kw_only=True)
class Stacked3x3(Block):
    """``width``: channels between two convolutions, as a share of the outputs."""

    id: ClassVar[str] = "stacked-3x3"
    width: Positive = 1.0
    activation: Activation = "none"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        if len(layer.kernel) != 2:
            return "it is no convolution over two dimensions"
        height, width = layer.kernel
        if height != width or height % 2 == 0:
            return f"its kernel is {height}x{width}; the block stands for odd squares"
        return needs_kernel(layer, least=5)

    def middle(self, layer: Layer) -> int:
        """M."""
        return max(1, round(self.width * layer.outputs))

    def spec(self, layer: Layer) -> Spec:
        middle, active, count = self.middle(layer), self.activation != "none", (layer.kernel[0] - 1) // 2
        found: list[Spec] = []
        for number in range(count):
            first, last = number == 0, number == count - 1
            found.append(
                layer.conv(
                    layer.inputs if first else middle, layer.outputs if last else middle, kernel_size=(3, 3),
                    padding=layer.padding if first else (0, 0), stride=layer.stride if last else (1, 1),
                    bias=(active or layer.bias) if last else active and not self.norm,
                )
            )  # fmt: skip
            found += [] if last else between(layer, middle, self.activation, norm=self.norm)
        return row(found)

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        *before, last = convs(block)
        left = weight
        for number in range(len(before), 0, -1):
            left, outer = stacked(left, self.middle(layer), (3, 3), rng)
            put(last if number == len(before) else before[number], outer, bias if number == len(before) else None)
        put(before[0], left)
