r"""Fire: a narrow 1x1, then 1x1 and k x k side by side on what it left.

Paper    Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer. SqueezeNet: AlexNet-level accuracy with 50x fewer parameters
         and <0.5MB model size. 2016. arXiv:1602.07360 (section 3.2)
Formula  s = squeeze * O;   y = concat(1x1(ReLU(1x1(x))), k x k(ReLU(1x1(x)))),   a share ``wide`` of the outputs k x k
Departs  The activation after the two is the network's own, as the block stands for a convolution before it; the kernel
         need not be 3x3. It starts from the trained weight, outputs of the 1x1 part from its middle tap, with squeezed
         channels shifted so that the ReLU lets them through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.decompose import channel_basis
from espalier.compact.parts import Activation, Block, Layer, Spec, between, branches, convs, needs_kernel, put, row
from espalier.core.fields import Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class Fire(Block):
    """``squeeze``: squeezed channels, as a share of the outputs. ``wide``: the share of outputs with the kernel."""

    id: ClassVar[str] = "fire"
    squeeze: Positive = 0.25
    wide: Fraction = 0.5
    activation: Activation = "relu"
    norm: bool = False

    def conflicts(self) -> list[str]:
        """Both parts have outputs."""
        return [] if 0 < self.wide < 1 else [f"wide={self.wide:g}: a fire module has outputs of both kinds; give 0.5"]

    def refusal(self, layer: Layer) -> str:
        return needs_kernel(layer) or ("it has one output; the block needs two" if layer.outputs < 2 else "")

    def sizes(self, layer: Layer) -> tuple[int, int, int]:
        """Squeezed channels, outputs of 1x1, outputs with the kernel."""
        wide = min(layer.outputs - 1, max(1, round(self.wide * layer.outputs)))
        return max(1, round(self.squeeze * layer.outputs)), layer.outputs - wide, wide

    def spec(self, layer: Layer) -> Spec:
        (narrow, ones, wide), active = self.sizes(layer), self.activation != "none"
        bias = active or layer.bias
        padding, rest = layer.ends(self.activation)
        centre = rest.centre()
        one = layer.pointwise(narrow, ones, bias=bias, stride=layer.stride)
        return row(
            layer.pointwise(layer.inputs, narrow, bias=active and not self.norm, padding=padding),
            between(layer, narrow, self.activation, norm=self.norm),
            branches(row(centre, one) if centre else one, rest.conv(narrow, wide, bias=bias)),
        )

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        narrow, ones, _ = self.sizes(layer)
        squeeze, one, wide = convs(block)
        middle = weight[:ones].flatten(2)[:, :, layer.middle_tap]
        both = torch.cat([middle, weight[ones:].transpose(1, -1).flatten(0, -2)])  # all that reads an input channel
        basis = channel_basis(both, min(narrow, layer.inputs), 1)
        basis = torch.cat([basis, basis.new_zeros(len(basis), narrow - basis.shape[1])], 1)
        put(squeeze, basis.T)
        put(one, middle @ basis, None if bias is None else bias[:ones])
        kernels = torch.einsum("oi...,is->os...", weight[ones:], basis)
        put(wide, kernels, None if bias is None else bias[ones:])
