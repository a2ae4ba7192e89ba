"""Layers, parameters and multiplications of the prepared graph: in int8, and all."""

from __future__ import annotations

import math

import onnx_ir as ir

from espalier.core.errors import ModelError
from espalier.deploy.int8.network import activations, shape_of
from espalier.deploy.int8.places import RECURRENT, Places, layer_name
from espalier.deploy.int8.prepare import ROWS
from espalier.deploy.int8.result import Coverage


def coverage_of(model: ir.Model, places: Places) -> Coverage:
    """Count before anything is written into the graph. Raises ``ModelError`` where no layer can be int8."""
    nodes = [*places.products, *places.left]
    if not places.products:
        reasons = "; ".join(f"{layer_name(node)}: {why}" for node, why in list(places.left.items())[:5])
        raise ModelError(
            f"nothing of this model can run in int8 (0 of {len(nodes)} layers): "
            f"{reasons or 'it has no convolution, linear layer or product of matrices'}. Export it in fp32."
        )
    parameters = sum(
        value.const_value.size for value in model.graph.initializers.values()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT
    )  # fmt: skip
    weights = {node.inputs[1]: _size(node.inputs[1]) for node in places.products}
    counts = {node: macs(node) for node in nodes}
    left: dict[str, str] = {}
    for node, why in places.left.items():
        name = layer_name(node)
        left[name if name not in left else str(node.name)] = why
    return Coverage(
        layers=len(places.products), of_layers=len(nodes), parameters=sum(weights.values()), of_parameters=parameters,
        macs=sum(counts[node] for node in places.products), of_macs=sum(counts.values()), left=left,
    )  # fmt: skip


def _size(value: ir.Value | None) -> int:
    return int(value.const_value.size) if value is not None and value.const_value is not None else 0


def macs(node: ir.Node) -> int:
    """Multiply-adds of a product for one sample; open sizes count as 1."""
    result = shape_of(node.outputs[0])
    if result is None:
        return 0
    sizes = [1 if size is None else size for size in result]
    weight = shape_of(node.inputs[1])
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None and sizes:
        given = shape_of(node.inputs[0])
        per = math.prod(size or 1 for size in weight[1:])
        if node.op_type == "ConvTranspose" and given is not None:
            return math.prod(size or 1 for size in given[1:]) * per
        return math.prod(sizes[1:]) * per
    if node.op_type in ("Gemm", "MatMul"):
        inner = shape_of(node.inputs[0])
        depth = (inner[-1] or 1) if inner else 1
        depth *= int(node.meta.get(ROWS, 1))
        return math.prod(sizes if len(activations(node)) > 1 or result[0] is None else sizes[1:]) * depth
    if node.op_type in RECURRENT and weight is not None:
        given = shape_of(node.inputs[0])
        recurrent = shape_of(node.inputs[2]) or ()
        steps = (given[0] or 1) if given else 1
        return steps * (math.prod(size or 1 for size in weight) + math.prod(size or 1 for size in recurrent))
    return 0
