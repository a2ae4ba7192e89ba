r"""Dilated kernels: few taps far apart see the same field as many close together.

Paper    Yu, Koltun. Multi-Scale Context Aggregation by Dilated Convolutions. ICLR 2016. arXiv:1511.07122
Formula  (F *_d k)(p) = sum_{s + d t = p} F(s) k(t);   k taps become ``taps``, (k - 1) / (taps - 1) times as far apart
Departs  The paper widens the field at equal weights; here the field stays and weights go. The block starts from the
         taps that are still there; what the others did is made up for by least squares on data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.parts import Block, Layer, Spec, convs, needs_kernel, put, row
from espalier.core.fields import Taps


@dataclass(frozen=True, kw_only=True)
class Dilated(Block):
    """``taps``: width of the kernel that is left, in every dimension."""

    id: ClassVar[str] = "dilated"
    taps: Taps = 3

    def conflicts(self) -> list[str]:
        """One tap has no field."""
        return [f"taps={self.taps}: a dilated kernel has at least 2"] if self.taps < 2 else []

    def refusal(self, layer: Layer) -> str:
        reason = needs_kernel(layer, groups=True, least=self.taps + 1)
        if not reason and any(k < self.taps or (k - 1) % (self.taps - 1) for k in layer.kernel):
            sizes = "x".join(map(str, layer.kernel))
            return f"its kernel is {sizes}, whose ends {self.taps} taps at equal distances do not meet"
        return reason

    def steps(self, layer: Layer) -> tuple[int, ...]:
        """Distance of two taps, in those of the layer."""
        return tuple((k - 1) // (self.taps - 1) for k in layer.kernel)

    def spec(self, layer: Layer) -> Spec:
        spread = tuple(d * step for d, step in zip(layer.dilation, self.steps(layer), strict=True))
        return row(
            layer.conv(layer.inputs, layer.outputs, groups=layer.groups, bias=layer.bias,
                       kernel_size=(self.taps,) * len(layer.kernel), dilation=spread)
        )  # fmt: skip

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        for dim, (size, step) in enumerate(zip(layer.kernel, self.steps(layer), strict=True), 2):
            weight = weight.index_select(dim, torch.arange(0, size, step, device=weight.device))
        put(convs(block)[0], weight, bias)
