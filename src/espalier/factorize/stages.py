"""The plain layers that a split layer becomes, as specs of a plan, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Spec = dict[str, Any]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

NOMINAL = 64
"""Places per axis in the output of a convolution whose inputs nobody has seen."""


@dataclass(frozen=True)
class Cost:
    """Numbers stored, and multiply-accumulates per sample."""

    parameters: int
    macs: int


def linear(inputs: int, outputs: int, *, bias: bool) -> Spec:
    """A Linear."""
    return {"class": "Linear", "args": {"in_features": inputs, "out_features": outputs, "bias": bias}}


def part_of(
    conv: Conv, inputs: int, outputs: int, axes: Sequence[int], *, groups: int, bias: bool
) -> Spec:  # fmt: skip
    """A convolution that does along ``axes`` what ``conv`` does (kernel, stride, padding, dilation), else nothing.

    A product of kernels pads each axis on its own, so every padding of torch may be taken apart like this: a stage
    without bias makes zeros of zeros, and repeats or mirrors what is repeated or mirrored.
    """
    own = range(len(conv.kernel_size))
    padding: Any = conv.padding
    if isinstance(padding, str):
        padding = padding if axes else 0
    else:
        padding = [padding[axis] if axis in axes else 0 for axis in own]
    return {
        "class": type(conv).__name__,
        "args": {
            "in_channels": inputs,
            "out_channels": outputs,
            "kernel_size": [conv.kernel_size[axis] if axis in axes else 1 for axis in own],
            "stride": [conv.stride[axis] if axis in axes else 1 for axis in own],
            "padding": padding,
            "dilation": [conv.dilation[axis] if axis in axes else 1 for axis in own],
            "groups": groups,
            "bias": bias,
            "padding_mode": conv.padding_mode if axes else "zeros",
        },
    }


def cost(specs: Sequence[Spec], size: Sequence[int]) -> Cost:
    """What layers in a row cost on inputs with ``size`` places along each axis (of a Linear: all but features)."""
    parameters, macs = 0, 0
    places = list(size)
    for spec in specs:
        name, args = spec["class"], spec["args"]
        if name == "Linear":
            weights = args["in_features"] * args["out_features"]
            parameters += weights + args["out_features"] * args["bias"]
            macs += weights * math.prod(places)
        elif name == "Embedding":
            parameters += args["num_embeddings"] * args["embedding_dim"]
        elif name.startswith("Conv"):
            places = [_places(n, axis, args) for axis, n in enumerate(places)]
            weights = args["out_channels"] * args["in_channels"] // args["groups"] * math.prod(args["kernel_size"])
            parameters += weights + args["out_channels"] * args["bias"]
            macs += weights * math.prod(places)
    return Cost(parameters, macs)


def _places(n: int, axis: int, args: Spec) -> int:
    """Outputs of a convolution along ``axis`` for ``n`` inputs."""
    extent = args["dilation"][axis] * (args["kernel_size"][axis] - 1)
    padding: Any = args["padding"]
    around = {"same": extent, "valid": 0}[padding] if isinstance(padding, str) else 0
    if isinstance(padding, (list, tuple)):
        around = 2 * padding[axis]
    stride: int = args["stride"][axis]
    return max(0, n + int(around) - int(extent) - 1) // stride + 1


def nominal_size(conv: Conv) -> tuple[int, ...]:
    """A size of inputs that gives about ``NOMINAL`` outputs along each axis."""
    return tuple(NOMINAL * stride + kernel for stride, kernel in zip(conv.stride, conv.kernel_size, strict=True))
