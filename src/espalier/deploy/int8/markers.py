"""Trained activation grids on their way through torch's exporter.

The exporter knows ``fake_quantize`` only over all 256 codes and only at a fixed batch. So during the export every such
call becomes one operator of our own, ``espalier::FakeQuantize``, that carries scale, zero point and codes; what is left
of it in the graph is turned into QuantizeLinear and DequantizeLinear later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DOMAIN, OPERATOR = "espalier", "FakeQuantize"

FUNCTION = """
<domain: "espalier", opset_import: ["" : 20]>
FakeQuantize <low, high> (x, scale, zero) => (y) {
    first = Constant <value_int: int = @low> ()
    last = Constant <value_int: int = @high> ()
    low = Cast <to: int = 1> (first)
    high = Cast <to: int = 1> (last)
    shift = Cast <to: int = 1> (zero)
    steps = Div (x, scale)
    rounded = Round (steps)
    code = Add (rounded, shift)
    cut = Clip (code, low, high)
    level = Sub (cut, shift)
    y = Mul (level, scale)
}
"""
"""What the operator computes, as ONNX writes functions: with it a marked graph runs in any runtime."""


class _Marking(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.fake_quantize_per_tensor_affine:
            return _per_tensor(*args, **(kwargs or {}))
        if func is torch.fake_quantize_per_channel_affine:
            return _per_channel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _per_tensor(input: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Tensor:  # noqa: A002 - torch's name
    return _marked(input, scale, zero_point, {"low": quant_min, "high": quant_max})


def _per_channel(input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:  # noqa: A002 - torch's name
    return _marked(input, scale, zero_point, {"low": quant_min, "high": quant_max, "axis": axis % input.ndim})


def _marked(values: Tensor, scale: Any, zero_point: Any, attributes: dict[str, Any]) -> Tensor:
    inputs = (values, torch.as_tensor(scale, dtype=torch.float32), torch.as_tensor(zero_point, dtype=torch.int32))
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}", inputs, attributes, dtype=values.dtype, shape=values.shape, version=1
    )
    return found


@contextmanager
def marked() -> Iterator[None]:
    """Within the block, ``torch.fake_quantize_*`` is exported as our own operator."""
    with _Marking():
        yield
