r"""Asymmetric kernels: a column of taps, then a row of taps, in place of a rectangle.

Paper    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision. CVPR 2016.
         arXiv:1512.00567 (section 3.2)
Formula  k_h x k_w, I -> O   becomes   k_h x 1, I -> M, then 1 x k_w, M -> O;   M = width * O
Departs  Linear between the two unless an activation is asked for: then a separable kernel is met exactly. It starts
         from the truncated SVD of the trained weight seen as (I k_h) x (k_w O), where the paper trains from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import separable
from espalier.compact.parts import Activation, Block, Layer, Spec, between, convs, needs_kernel, put, row
from espalier.core.fields import Positive


@dataclass(frozen=True, kw_only=True)
class AsymmetricKernels(Block):
    """``width``: channels between the two, as a share of the outputs."""

    id: ClassVar[str] = "asymmetric-kernels"
    width: Positive = 0.5
    activation: Activation = "none"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        if len(layer.kernel) != 2:
            return "it is no convolution over two dimensions"
        return needs_kernel(layer) or ("" if min(layer.kernel) > 1 else "its kernel has one row or one column already")

    def middle(self, layer: Layer) -> int:
        """M."""
        return max(1, round(self.width * layer.outputs))

    def spec(self, layer: Layer) -> Spec:
        middle, active = self.middle(layer), self.activation != "none"
        (height, width), (sy, sx), (py, px), (dy, dx) = layer.kernel, layer.stride, layer.padding, layer.dilation
        return row(
            layer.conv(layer.inputs, middle, bias=active and not self.norm,
                       kernel_size=(height, 1), stride=(sy, 1), padding=(py, 0), dilation=(dy, 1)),
            between(layer, middle, self.activation, norm=self.norm),
            layer.conv(middle, layer.outputs, bias=active or layer.bias,
                       kernel_size=(1, width), stride=(1, sx), padding=(0, px), dilation=(1, dx)),
        )  # fmt: skip

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        first, second = convs(block)
        columns, rows = separable(weight, self.middle(layer))
        put(first, columns)
        put(second, rows, bias)
