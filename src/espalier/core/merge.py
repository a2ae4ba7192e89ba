"""Two linear layers that meet are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.core.edits import Edit, module_at, put_module
from espalier.core.errors import ModelError
from espalier.core.parametrize import require_phase, slots


@dataclass(frozen=True, kw_only=True)
class Merge(Edit):
    """Make one layer of the linear layer or convolution at ``first`` and the one at ``second`` that alone reads it."""

    kind: ClassVar[str] = "merge"
    first: str
    second: str

    def apply(self, model: nn.Module) -> None:
        """The product of both takes the place of ``second``, an identity that of ``first``; exact up to rounding."""
        one, two = module_at(model, self.first), module_at(model, self.second)
        reason = unmergeable(one, two)
        if reason:
            raise ModelError(f"{self.first} and {self.second} cannot be merged: {reason}.")
        known = slots(model)
        for path in (self.first, self.second):
            slot = known[f"{path}.weight"]
            if len(slot.owners) > 1:
                raise ModelError(f"{path} shares its weight ({', '.join(slot.names)}) and cannot be merged.")
            require_phase(slot, ("dense",), f"merging {path}")
        merged = merge(one, two).train(two.training)
        merged.requires_grad_(two.weight.requires_grad)
        put_module(model, self.second, merged)
        put_module(model, self.first, nn.Identity())


def unmergeable(one: nn.Module, two: nn.Module) -> str:
    """Why two layers in a row are not one; empty if they are."""
    if isinstance(one, nn.Linear) and isinstance(two, nn.Linear):
        return ""
    if not (isinstance(one, nn.Conv2d) and isinstance(two, nn.Conv2d)):
        return "only two linear layers or two 2-D convolutions can be"
    if one.groups != 1 or two.groups != 1:
        return "grouped convolutions are left alone"
    pointwise = two.kernel_size == (1, 1)
    if isinstance(two.padding, str) or any(two.padding):
        return "the second pads what the first gives, which is no padding of the first one's input"
    if not pointwise and (one.stride != (1, 1) or one.dilation != (1, 1) or two.dilation != (1, 1)):
        return "a stride or dilation before a kernel larger than 1 x 1 would need a sparse kernel"
    if isinstance(one.padding, str) or one.padding_mode != "zeros":
        return "its padding is not a number of zeros"
    return ""


def merge(one: Any, two: Any) -> Any:
    """One layer that computes ``two(one(x))``; see :func:`unmergeable`.

    Linear: W = W2 W1, b = W2 b1 + b2. Convolutions: the kernels convolved, k = k1 + k2 - 1; b = b2 + sum W2 b1.
    """
    with torch.no_grad():
        w1, w2 = one.weight.double(), two.weight.double()
        b1 = one.bias.double() if one.bias is not None else w1.new_zeros(w1.shape[0])
        biased = one.bias is not None or two.bias is not None
        if isinstance(one, nn.Linear):
            layer: Any = nn.Linear(one.in_features, two.out_features, bias=biased)
            weight, shift = w2 @ w1, w2 @ b1
        else:
            k1, k2 = one.kernel_size, two.kernel_size
            size = (k1[0] + k2[0] - 1, k1[1] + k2[1] - 1)
            stride = tuple(a * b for a, b in zip(one.stride, two.stride, strict=True))
            layer = nn.Conv2d(
                one.in_channels, two.out_channels, size, stride, one.padding, one.dilation, bias=biased
            )  # fmt: skip
            full = (k2[0] - 1, k2[1] - 1)
            weight = torch.conv2d(w1.transpose(0, 1), w2.flip(2, 3), padding=full).transpose(0, 1)
            shift = w2.sum((2, 3)) @ b1
        layer.to(one.weight.device, one.weight.dtype)
        layer.weight.copy_(weight)
        if biased:
            layer.bias.copy_(shift if two.bias is None else shift + two.bias.double())
    return layer
