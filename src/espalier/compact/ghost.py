r"""Ghost: some outputs are computed in full, the others are cheap images of these.

Paper    Han, Wang, Tian, Guo, Xu, Xu. GhostNet: More Features from Cheap Operations. CVPR 2020. arXiv:1911.11907
Formula  m = ceil(O / ratio);   y' = conv(x), m outputs;   y = [y', phi(y')] cut to O,   phi: ``cheap`` x ``cheap``
         kernels, ratio - 1 for each of the m
Departs  No activation behind the two parts: the block stands for a convolution before the network's own. It starts
         from the rank-1 form, with a 1 for the first, of each set of outputs that shares a full one; sets follow from
         the order of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.compact.parts import Block, Layer, Spec, branches, convs, needs_kernel, put, row
from espalier.core.fields import Channels, Taps

SWEEPS = 20
"""Of alternating least squares between full kernels and the factors of their ghosts."""


@dataclass(frozen=True, kw_only=True)
class Ghost(Block):
    """``ratio``: outputs for each that is computed in full. ``cheap``: width of the cheap kernels, odd."""

    id: ClassVar[str] = "ghost"
    ratio: Channels = 2
    cheap: Taps = 3

    def conflicts(self) -> list[str]:
        """A ghost has an original, and a middle tap."""
        found = [f"ratio={self.ratio}: at least 2, or there are no ghosts"] if self.ratio < 2 else []
        return found + ([f"cheap={self.cheap}: give an odd number"] if self.cheap % 2 == 0 else [])

    def refusal(self, layer: Layer) -> str:
        reason = needs_kernel(layer, least=1)
        if not reason and layer.outputs < 2:
            return "it has one output; the block needs two"
        return reason

    def spec(self, layer: Layer) -> Spec:
        full, dims = -(-layer.outputs // self.ratio), len(layer.kernel)
        ghosts = layer.conv(
            full, full * (self.ratio - 1), groups=full, bias=layer.bias, kernel_size=(self.cheap,) * dims,
            stride=(1,) * dims, padding=(self.cheap // 2,) * dims, dilation=(1,) * dims, padding_mode="zeros",
        )  # fmt: skip
        cut = {"class": "First", "args": {"channels": layer.outputs}} if layer.outputs % self.ratio else None
        return row(layer.conv(layer.inputs, full, bias=layer.bias), branches({"class": "Identity"}, ghosts), cut)

    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        primary, cheap = convs(block)
        full = -(-layer.outputs // self.ratio)
        missing = full * self.ratio - layer.outputs
        flat = torch.cat([weight.flatten(1), weight.new_zeros(missing, weight[0].numel())])
        own, others = flat[:full], flat[full:].reshape(full, self.ratio - 1, -1)
        first = own
        for _ in range(SWEEPS):
            factors = torch.einsum("mrk,mk->mr", others, first) / first.square().sum(1, keepdim=True).clamp_min(1e-30)
            first = own + torch.einsum("mr,mrk->mk", factors, others)
            first = first / (1 + factors.square().sum(1, keepdim=True))
        taps = self.cheap ** len(layer.kernel)
        kernels = factors.new_zeros(factors.numel(), taps)
        kernels[:, taps // 2] = factors.flatten()
        put(primary, first, None if bias is None else bias[:full])
        if bias is not None:
            rest = torch.cat([bias[full:], bias.new_zeros(missing)])
            put(cheap, kernels, rest - factors.flatten() * bias[:full].repeat_interleave(self.ratio - 1))
        else:
            put(cheap, kernels)
