r"""Shuffle: 1x1 in groups or in branches, a kernel for each channel, and channels shuffled so that groups meet.

Paper    Zhang, Zhou, Lin, Sun. ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices. CVPR
         2018. arXiv:1707.01083. Ma, Zhang, Zheng, Sun. ShuffleNet V2. ECCV 2018. arXiv:1807.11164
Formula  v1: grouped 1x1 -> act -> shuffle(g) -> k x k for each -> grouped 1x1
         v2: concat(1x1(k x k for each), 1x1(k x k for each(act(1x1)))) -> shuffle(2)
Departs  v2 is the unit with two computed branches at every stride, and v1 has no shortcut: channels that pass
         unchanged, or pooled, cannot stand for those of a trained layer. No batch norms unless asked for. Both start
         from CP-3 decompositions of the parts of the trained weight that their groups can reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.compact.decompose import canonical, slices
from espalier.compact.parts import Activation, Block, Layer, Spec, between, branches, convs, needs_kernel, put, row
from espalier.core.fields import Channels, Positive


@dataclass(frozen=True, kw_only=True)
class Shuffle(Block):
    """``width``: channels with a kernel of their own, as a share of the outputs. ``groups``: of version 1."""

    id: ClassVar[str] = "shuffle"
    version: Literal[1, 2] = 2
    width: Positive = 0.5
    groups: Channels = 2
    activation: Activation = "relu"
    norm: bool = False

    def refusal(self, layer: Layer) -> str:
        parts = 2 if self.version == 2 else self.groups
        reason = needs_kernel(layer)
        if reason or not (layer.outputs % parts or (self.version == 1 and layer.inputs % parts)):
            return reason
        return f"its {layer.inputs} inputs and {layer.outputs} outputs do not make {parts} equal groups"

    def middle(self, layer: Layer) -> int:
        """Channels with a kernel of their own; of version 1 a multiple of the groups squared."""
        unit = self.groups**2 if self.version == 1 else 1
        return unit * max(1, round(self.width * layer.outputs / unit))

    def spec(self, layer: Layer) -> Spec:
        middle, active = self.middle(layer), self.activation != "none"
        inner, last = active and not self.norm, active or layer.bias
        shuffle = {"class": "ChannelShuffle", "args": {"groups": 2 if self.version == 2 else self.groups}}
        padding, rest = layer.ends(self.activation)
        after = between(layer, middle, self.activation, norm=self.norm)
        if self.version == 1:
            return row(
                layer.pointwise(layer.inputs, middle, bias=inner, groups=self.groups, padding=padding), after, shuffle,
                rest.conv(middle, middle, groups=middle),
                layer.pointwise(middle, layer.outputs, bias=last, groups=self.groups),
            )  # fmt: skip
        half = layer.outputs // 2
        one = row(layer.conv(layer.inputs, layer.inputs, groups=layer.inputs),
                  layer.pointwise(layer.inputs, half, bias=last))  # fmt: skip
        two = row(layer.pointwise(layer.inputs, middle, bias=inner, padding=padding), after,
                  rest.conv(middle, middle, groups=middle),
                  layer.pointwise(middle, half, bias=last))  # fmt: skip
        return row(branches(one, two), shuffle)

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        flat = weight.flatten(2)
        if self.version == 1:
            self._start_grouped(block, layer, flat, bias)
            return
        own, mix, expand, depthwise, project = convs(block)
        kernels, mixing = slices(flat[0::2], 1)
        put(own, kernels)
        put(mix, mixing, None if bias is None else bias[0::2])
        outer, inner, taps = canonical(flat[1::2], self.middle(layer))
        put(expand, inner.T)
        put(depthwise, taps.T)
        put(project, outer, None if bias is None else bias[1::2])

    def _start_grouped(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        """Channels b n to b n + n - 1 of group a reach the outputs of group b, behind the shuffle."""
        g = self.groups
        per = self.middle(layer) // g**2
        expand, depthwise, project = convs(block)
        inputs = weight.new_zeros(g, g, per, layer.inputs // g)  # (a, b, channel, input)
        taps = weight.new_zeros(g, per, g, layer.taps)  # (b, channel, a, tap): the order behind the shuffle
        outputs = weight.new_zeros(g, layer.outputs // g, per, g)  # (b, output, channel, a)
        for a, columns in enumerate(weight.chunk(g, 1)):
            for b, part in enumerate(columns.chunk(g, 0)):
                outer, inner, kernels = canonical(part, per)
                inputs[a, b], taps[b, :, a], outputs[b, :, :, a] = inner.T, kernels.T, outer
        put(expand, inputs)
        put(depthwise, taps)
        put(project, outputs, bias)
