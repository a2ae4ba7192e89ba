"""What TensorRT demands of a file with QuantizeLinear and DequantizeLinear, checked without TensorRT.

Source: NVIDIA, TensorRT developer guide, "Working with quantized types", explicit quantization.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from espalier.core.errors import ModelError
from espalier.deploy.int8.network import attribute, constant
from espalier.deploy.int8.prepare import output_axis

WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def broken_rules(model: ir.Model) -> list[str]:
    """One sentence for every rule that a node breaks; empty for a file TensorRT takes."""
    found: list[str] = []
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += _scale(node)
        elif node.op_type in WITH_WEIGHTS:
            found += _layer(node)
    return found


def check_rules(model: ir.Model) -> None:
    """Raises ``ModelError`` with the first broken rules."""
    broken = broken_rules(model)
    if broken:
        more = f" (and {len(broken) - 3} more)" if len(broken) > 3 else ""
        raise ModelError(f"TensorRT would refuse this file: {'; '.join(broken[:3])}{more}. No file was written.")


def _scale(node: ir.Node) -> list[str]:
    found = []
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or not (scale > 0).all():
        found.append(f"{node.name}: the scale must be a constant above 0")
    if zero is None or zero.dtype != np.int8 or zero.any():
        found.append(f"{node.name}: the zero point must be int8 and 0")
    if node.op_type == "QuantizeLinear" and scale is not None and scale.ndim:
        found.append(f"{node.name}: activations have one scale per tensor")
    return found


def _layer(node: ir.Node) -> list[str]:
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    if weight is None or weight.op_type != "DequantizeLinear" or constant(weight.inputs[0]) is None:
        return []
    found = []
    scale = constant(weight.inputs[1])
    if scale is not None and scale.ndim and attribute(weight, "axis", 1) != output_axis(node):
        found.append(f"{node.name}: scales of a weight stand along its output channels")
    given = node.inputs[0].producer() if node.inputs[0] is not None else None
    while given is not None and given.op_type in ("Reshape", "Transpose", "Flatten", "MaxPool", "Squeeze", "Unsqueeze"):
        given = given.inputs[0].producer() if given.inputs[0] is not None else None
    if given is None or given.op_type != "DequantizeLinear":
        found.append(f"{node.name}: the weight is int8 and the input is not")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.dtype != ir.DataType.FLOAT:
        found.append(f"{node.name}: the bias must be fp32")
    elif bias is not None and (made := bias.producer()) is not None and made.op_type == "DequantizeLinear":
        found.append(f"{node.name}: the bias must be fp32 without DequantizeLinear")
    return found
