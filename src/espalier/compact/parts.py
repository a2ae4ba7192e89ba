"""What a block stands for, and what it must do: describe itself as a spec, and start from trained weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.method import Method

Spec = dict[str, Any]
"""A module as plain data: see ``core/spec.py``."""

Activation = Literal["none", "relu", "relu6"]
"""What stands between the layers of a block."""

ACTIVATIONS = {"relu": "ReLU", "relu6": "ReLU6"}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that a block can stand for; a subclass may compute something else."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A trained layer as a block sees it. A linear one has no kernel: ``kernel == ()``.

    ``padding``: entries put on both ends of each dimension. ``map``: ``(channels, height, width)`` of the feature map
    that was flattened into the input of a linear layer, where that is known.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    mode: str = "zeros"
    map: tuple[int, ...] | None = None

    @classmethod
    def of(cls, module: nn.Module, feature_map: tuple[int, ...] | None = None) -> Layer:
        """The description of one of ``LAYERS``."""
        bias = module.bias is not None
        if isinstance(module, nn.Linear):
            return cls(inputs=module.in_features, outputs=module.out_features, bias=bias, map=feature_map)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))  # noqa: S101 - the caller has looked
        padding = tuple(
            module.padding if not isinstance(module.padding, str) else
            (d * (k - 1) // 2 if module.padding == "same" else 0
             for d, k in zip(module.dilation, module.kernel_size, strict=True))
        )  # fmt: skip
        return cls(
            inputs=module.in_channels, outputs=module.out_channels, kernel=module.kernel_size, stride=module.stride,
            padding=padding, dilation=module.dilation, groups=module.groups, bias=bias, mode=module.padding_mode,
        )  # fmt: skip

    @property
    def taps(self) -> int:
        """Entries of one kernel."""
        return math.prod(self.kernel)

    @property
    def middle_tap(self) -> int:
        """The number of the tap in the middle of a kernel seen as one row."""
        number = 0
        for k in self.kernel:
            number = number * k + (k - 1) // 2
        return number

    @property
    def keeps_size(self) -> bool:
        """Whether a map leaves as large as it came."""
        return all(
            s == 1 and 2 * p == d * (k - 1)
            for k, s, p, d in zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    @property
    def same(self) -> bool:
        """Whether the layer's input can be added to its output."""
        return bool(self.kernel) and self.keeps_size and self.inputs == self.outputs

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of its weight."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.weight_shape) + self.outputs * self.bias

    # --- specs of pieces -------------------------------------------------------------------------

    def conv(self, inputs: int, outputs: int, *, groups: int = 1, bias: bool = False, **changes: Any) -> Spec:
        """A convolution with this layer's kernel, stride, padding and dilation; ``changes`` replace these."""
        args: dict[str, Any] = {
            "in_channels": inputs, "out_channels": outputs, "kernel_size": self.kernel, "stride": self.stride,
            "padding": self.padding, "dilation": self.dilation, "groups": groups, "bias": bias,
            "padding_mode": self.mode, **changes,
        }  # fmt: skip
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
        return {"class": f"Conv{len(self.kernel)}d", "args": plain}

    def pointwise(
        self, inputs: int, outputs: int, *, bias: bool = False, groups: int = 1, stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
    ) -> Spec:  # fmt: skip
        """A 1x1 convolution, at stride 1 and without padding unless given; for a linear layer a linear one."""
        if not self.kernel:
            return {"class": "Linear", "args": {"in_features": inputs, "out_features": outputs, "bias": bias}}
        ones = (1,) * len(self.kernel)
        return self.conv(
            inputs, outputs, groups=groups, bias=bias, kernel_size=ones, stride=tuple(stride or ones),
            padding=tuple(padding or (0,) * len(ones)), dilation=ones,
        )  # fmt: skip

    def ends(self, activation: Activation) -> tuple[tuple[int, ...], Layer]:
        """What a 1x1 convolution before the kernel pads, and the layer that remains.

        Before an activation zeros are no longer what they were in front of the layer: all padding goes to the input.
        """
        none = (0,) * len(self.kernel)
        return (none, self) if activation == "none" else (self.padding, replace(self, padding=none))

    def centre(self) -> Spec | None:
        """What leaves each output of this layer, at stride 1, the input under the middle of its kernel; None for all.

        Zeros are put around, or a margin is cut off.
        """
        amounts: list[int] = []
        for k, p, d in zip(reversed(self.kernel), reversed(self.padding), reversed(self.dilation), strict=True):
            before = d * ((k - 1) // 2)
            amounts += [p - before, p - (d * (k - 1) - before)]
        return {"class": "Pad", "args": {"amounts": amounts}} if any(amounts) else None

    def norm(self, channels: int) -> Spec:
        """A batch norm."""
        return {"class": f"BatchNorm{max(1, len(self.kernel))}d", "args": {"num_features": channels}}


def row(*specs: Spec | Sequence[Spec] | None) -> Spec:
    """Specs in a row; ``None`` is left out, a list is taken apart."""
    children: list[Spec] = []
    for spec in specs:
        children += [] if spec is None else [spec] if isinstance(spec, dict) else list(spec)
    return {"class": "Sequential", "children": children}


def branches(*specs: Spec, sizes: Sequence[int] | None = None) -> Spec:
    """Specs side by side, joined along the channels."""
    args = {} if sizes is None else {"args": {"sizes": list(sizes)}}
    return {"class": "Branches", "children": list(specs), **args}


def residual(spec: Spec) -> Spec:
    """A spec and a shortcut around it."""
    return {"class": "Add", "children": [{"class": "Identity"}, spec]}


def between(layer: Layer, channels: int, activation: Activation, *, norm: bool) -> list[Spec]:
    """What follows a convolution inside a block: a batch norm and an activation, where they are asked for."""
    found = [layer.norm(channels)] if norm else []
    return found + ([] if activation == "none" else [{"class": ACTIVATIONS[activation]}])


@dataclass(frozen=True, kw_only=True)
class Block(Method):
    """A small module that stands for a layer: same inputs, same outputs, fewer weights."""

    kind: ClassVar[str] = "block"
    reads_map: ClassVar[bool] = False
    """Whether it needs to know which feature map a linear layer reads (``Layer.map``)."""

    @abstractmethod
    def refusal(self, layer: Layer) -> str:
        """Why it cannot stand for ``layer``; empty where it can."""

    @abstractmethod
    def spec(self, layer: Layer) -> Spec:
        """The module, as a plan holds it. Only for layers that are not refused."""

    @abstractmethod
    def start(self, block: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None, rng: torch.Generator) -> None:
        """Fill ``block``, just built, with the best that can be said from the layer's ``weight`` and ``bias`` alone.

        Activations and batch norms inside are taken for identities: :func:`espalier.compact.starting.settle` sees
        to that on data. ``rng`` is on the CPU.
        """


def needs_kernel(layer: Layer, *, groups: bool = False, least: int = 2) -> str:
    """Why a block that splits up a kernel cannot stand for ``layer``: no convolution, groups, a kernel too small."""
    if not layer.kernel:
        return "it is no convolution"
    if layer.groups > 1 and not groups:
        return f"its {layer.groups} groups cannot be kept by the block"
    if max(layer.kernel) < least:
        return f"its kernel is {'x'.join(map(str, layer.kernel))}; the block needs at least {least}"
    return ""


def put(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Copy values into a layer's own weight, and into its bias if it has one: zeros where none are given."""
    assert isinstance(module, LAYERS)  # noqa: S101 - what convs() finds
    with torch.no_grad():
        module.weight.copy_(weight.reshape(module.weight.shape))
        if module.bias is not None:
            module.bias.zero_() if bias is None else module.bias.copy_(bias)


def convs(module: nn.Module) -> list[nn.Module]:
    """The layers with weights inside a block, in order; batch norms are not among them."""
    return [part for part in module.modules() if isinstance(part, LAYERS)]


def unit_kernel(layer: Layer, weight: Tensor) -> Tensor:
    """A weight of the shape of ``weight`` that hands its input on: 1 in the middle where input and output agree."""
    found = torch.zeros_like(weight)
    taps = found.flatten(2)  # a view
    channels = torch.arange(min(weight.shape[:2]))
    taps[channels, channels, layer.middle_tap] = 1.0
    return found
