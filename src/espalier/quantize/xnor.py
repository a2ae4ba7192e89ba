r"""XNOR-Net inputs: signs into the layer, its output scaled by how large the inputs were at each place.

Paper    Rastegari, Ordonez, Redmon, Farhadi. XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
         Networks. ECCV 2016. arXiv:1603.05279 (section 3.2)
Formula  y = (sign(x) * W) K + bias;   K = A * k, A = <|x|> over the input channels, k = 1 / (w h) everywhere, with
         the stride and padding of the layer (a linear layer: K = <|x|>);   dL/dx through the sign: 1[|x| <= 1]
Departs  With quantize.bwn for the weights this is the paper's layer. The order of a block, batch norm then sign then
         convolution, is the user's architecture: inputs that are never negative are left alone. The gradient also flows
         through K, which the paper leaves open; the authors' released code has no K. Groups of a convolution have a K
         each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from espalier.core.errors import ModelError
from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.quantize.binary_input import binary_input, never_negative

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def magnitudes(layer: Layer, x: Tensor) -> Tensor:
    """K: (..., 1) for a linear layer, (..., 1 or output channels, places of the output) for a convolution."""
    if isinstance(layer, nn.Linear):
        return x.abs().mean(-1, keepdim=True)
    channels = -1 - len(layer.kernel_size)
    sizes: Tensor = x.abs().unflatten(channels, (layer.groups, -1)).mean(channels)  # type: ignore[no-untyped-call]
    box = x.new_full((layer.groups, 1, *layer.kernel_size), 1 / math.prod(layer.kernel_size))
    found: Tensor = layer._conv_forward(sizes, box, None)
    if layer.groups > 1:
        found = found.repeat_interleave(layer.out_channels // layer.groups, channels)
    return found


@dataclass(frozen=True, kw_only=True)
class XNORInput(ActivationQuantizer):
    """Inputs as +1 and -1, outputs scaled by the magnitudes of the inputs; for linear layers and convolutions."""

    id: ClassVar[str] = "xnor-input"
    widths: ClassVar[tuple[int, ...]] = (1,)

    def refuses(self, layer: nn.Module, observed: Observed) -> str | None:
        if not isinstance(layer, Layer):
            return f"{self.id} scales the outputs of linear layers and convolutions; use binary-input"
        return never_negative(observed)

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        return binary_input(x)

    def run(self, layer: nn.Module, forward: Callable[..., Any], x: Tensor, a: Input) -> Any:
        if not isinstance(layer, Layer):
            raise ModelError(
                f"{self.id} scales the outputs of linear layers and convolutions; {type(layer).__name__} is neither. "
                "Leave it out of layers, or use binary-input."
            )
        size = magnitudes(layer, x)
        found = forward(self.quantize(x, a))
        if layer.bias is None:
            return found * size
        bias = layer.bias if isinstance(layer, nn.Linear) else layer.bias.reshape(-1, *(1 for _ in layer.kernel_size))
        return (found - bias) * size + bias
