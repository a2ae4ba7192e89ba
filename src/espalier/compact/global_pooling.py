r"""Global average pooling: one number per channel in place of a fully connected layer over the whole map.

Paper    Lin, Chen, Yan. Network In Network. ICLR 2014. arXiv:1312.4400 (section 3.2)
Formula  y = W mean_{h,w} x[:, h, w] + b,   W (outputs, channels), in place of y = W' vec(x) + b
Departs  The paper's last convolution has one map per class and is then averaged; a linear layer on the averages is the
         same function. It starts as the sum of the trained weight over the places of the map: right for maps that are
         constant; the rest is least squares on data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.parts import Block, Layer, Spec, convs, put, row


@dataclass(frozen=True, kw_only=True)
class GlobalPooling(Block):
    """Stands for a linear layer that reads a flattened map."""

    id: ClassVar[str] = "global-pooling"
    reads_map: ClassVar[bool] = True

    def refusal(self, layer: Layer) -> str:
        if layer.kernel:
            return "it is no fully connected layer"
        return "" if layer.map is not None else "it does not read a flattened feature map of more than one place"

    def spec(self, layer: Layer) -> Spec:
        assert layer.map is not None  # noqa: S101 - see refusal()
        return row(
            {"class": "Unflatten", "args": {"dim": 1, "unflattened_size": list(layer.map)}},
            {"class": "AdaptiveAvgPool2d", "args": {"output_size": 1}},
            {"class": "Flatten"},
            layer.pointwise(layer.map[0], layer.outputs, bias=layer.bias),
        )

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        assert layer.map is not None  # noqa: S101 - see refusal()
        put(convs(block)[0], weight.reshape(layer.outputs, layer.map[0], -1).sum(2), bias)
