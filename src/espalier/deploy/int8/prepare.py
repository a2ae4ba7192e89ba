"""The fp32 graph made ready: norms, scales and shifts in the weights, so that a layer is one operator.

What torch's exporter leaves is a convolution or product with a constant weight, followed perhaps by a multiplication
and an addition per channel (a batch norm, or what :class:`~espalier.core.plan.Normalise` made of one).
Folding: w' = w s, b' = b s + t (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from espalier.deploy.int8.network import (
    activations,
    attribute,
    constant,
    initializer,
    insert,
    only_reader,
    remove,
    replace_uses,
    shape_of,
)
from espalier.deploy.int8.profile import RuntimeProfile
from espalier.deploy.int8.trained import fixed_weight, is_marker, mark_pairs, settle
from espalier.deploy.int8.weights import Fixed
from espalier.deploy.runtimes import Array

ROWS = "rows"
"""Key of a Gemm's ``meta``: its rows per sample, where the shape no longer tells."""

FOLDS_INTO = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def prepare(path: Path, profile: RuntimeProfile) -> tuple[ir.Model, list[Fixed]]:
    """Read an fp32 file and write it as ``profile`` wants it; the function is the same up to rounding.

    Also returns the codes of weights that the model itself quantizes.
    """
    model = ir.load(path)
    ir.external_data.load_to_model(model)
    graph = model.graph
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    mark_pairs(graph)
    fixed = [each for node in tuple(graph) if is_marker(node) and (each := fixed_weight(graph, node)) is not None]
    folded = 1
    while folded:
        folded = sum(_fold(graph, node) for node in tuple(graph))
    settle(graph, profile)
    for node in tuple(graph):
        _mean_as_pool(node)
        _plain_gemm(graph, node)
        if profile.one_pass:
            _as_gemm(graph, node)
        if profile.norm_apart:
            _apart(graph, node)
    passes.RemoveUnusedNodesPass()(model)
    return model, fixed


def output_axis(node: ir.Node) -> int:
    """The axis of the weight that numbers the output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    """Fold ``node`` into the layer before it where it is a scale, a shift or a batch norm per output channel."""
    if node.op_type not in ("Mul", "Add", "BatchNormalization") or len(given := activations(node)) != 1:
        return False
    layer = given[0].producer()
    if layer is None or layer.op_type not in FOLDS_INTO or only_reader(given[0]) is not node:
        return False
    weight = constant(layer.inputs[1])
    if weight is None or (layer.op_type == "MatMul" and weight.ndim != 2):
        return False
    axis = output_axis(layer)
    groups = attribute(layer, "group", 1) if layer.op_type == "ConvTranspose" else 1
    channels = weight.shape[axis] * groups
    found = _scale_and_shift(node, given[0], channels, last=layer.op_type in ("Gemm", "MatMul"))
    if found is None or (layer.op_type == "MatMul" and (found[1] != 0).any()):
        return False
    scale, shift = found
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] is not None else np.zeros(channels)
    if bias is None or bias.size not in (1, channels):
        return False
    if not (scale == 1).all():
        per_weight = scale.reshape(groups, -1).repeat(weight.shape[0] // groups, 0) if groups > 1 else scale
        view = (*per_weight.shape, *[1] * (weight.ndim - 2)) if groups > 1 else _along(axis, weight.ndim)
        _replace(graph, layer, 1, (weight * per_weight.reshape(view)).astype(np.float32))
    if layer.op_type != "MatMul":
        folded = (bias.reshape(-1) * scale + shift).astype(np.float32)
        name = f"{layer.name}/bias"
        layer.resize_inputs(3)
        layer.replace_input_with(2, initializer(graph, name, folded))
    replace_uses(node.outputs[0], given[0])
    remove(node)
    return True


def _along(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(-1 if place == axis else 1 for place in range(ndim))


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    """Give ``node`` other numbers at ``index``; the constant keeps its name where nothing else reads it."""
    old = node.inputs[index]
    name = str(old.name) if old is not None else f"{node.name}/{index}"
    if old is not None and len(tuple(old.uses())) == 1 and name in graph.initializers:
        del graph.initializers[name]
    node.replace_input_with(index, initializer(graph, name, array))


def _scale_and_shift(node: ir.Node, given: ir.Value, channels: int, *, last: bool) -> tuple[Array, Array] | None:
    """What ``node`` does per channel, as float64 arrays of ``channels``; None where it does something else."""
    if node.op_type == "BatchNormalization":
        parts = [constant(value) for value in node.inputs[1:5]]
        if any(part is None for part in parts) or attribute(node, "training_mode", 0) or len(node.outputs) != 1:
            return None
        gamma, beta, mean, variance = (np.asarray(part, np.float64) for part in parts)
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        return scale, beta - mean * scale
    other = next((constant(value) for value in node.inputs if value is not given), None)
    shape = shape_of(given)
    if other is None or shape is None or other.dtype != np.float32:
        return None
    axis = len(shape) - 1 if last else 1
    wanted = [channels if place == axis else 1 for place in range(len(shape))]
    padded = (1,) * (len(shape) - other.ndim) + other.shape
    if other.size != 1 and list(padded) != wanted:
        return None
    numbers = np.broadcast_to(other.astype(np.float64).reshape(-1), (channels,))
    if node.op_type == "Mul":
        return numbers, np.zeros(channels)
    return np.ones(channels), numbers


def _mean_as_pool(node: ir.Node) -> None:
    """A mean over the image is a GlobalAveragePool, for which runtimes have int8 code."""
    if node.op_type != "ReduceMean" or attribute(node, "noop_with_empty_axes", 0):
        return
    given, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = shape_of(given)
    if given is None or axes is None or shape is None or len(shape) != 4:
        return
    if sorted(int(axis) % 4 for axis in axes.reshape(-1)) != [2, 3]:
        return
    pooled = insert(node, "GlobalAveragePool", [given], f"{node.name}/GlobalAveragePool", before=True, like=given)
    pooled.shape = ir.Shape([*given.shape[:2], 1, 1]) if given.shape is not None else None
    if not attribute(node, "keepdims", 1):
        flat = insert(node, "Flatten", [pooled], f"{node.name}/Flatten", {"axis": 1}, before=True)
        flat.shape, flat.type = node.outputs[0].shape, pooled.type
        pooled = flat
    replace_uses(node.outputs[0], pooled)
    remove(node)


def _apart(graph: ir.Graph, node: ir.Node) -> None:
    """A reshape to the same shape between a sum and the layer norm that alone reads it: nothing fuses across it."""
    given = node.inputs[0] if node.op_type == "LayerNormalization" else None
    shape = shape_of(given)
    if given is None or shape is None or (made := given.producer()) is None or made.op_type != "Add":
        return
    if only_reader(given) is node and sum(size is None for size in shape) == 1:
        sizes = initializer(graph, f"{node.name}/shape", np.array([-1 if s is None else s for s in shape], np.int64))
        same = insert(node, "Reshape", [given, sizes], f"{node.name}/apart", before=True, like=given)
        node.replace_input_with(0, same)


def _plain_gemm(graph: ir.Graph, node: ir.Node) -> None:
    """alpha and beta in the weight and the bias; the bias one number per channel."""
    weight = constant(node.inputs[1]) if node.op_type == "Gemm" else None
    if weight is None:
        return
    for index, name in ((1, "alpha"), (2, "beta")):
        factor = attribute(node, name, 1.0)
        array = constant(node.inputs[index]) if index < len(node.inputs) else None
        if array is not None and factor != 1.0:
            _replace(graph, node, index, (array * np.float32(factor)).astype(np.float32))
            node.attributes[name] = ir.AttrFloat32(name, 1.0)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    channels = weight.shape[output_axis(node)]
    if bias is not None and bias.shape != (channels,) and bias.size in (1, channels):
        _replace(graph, node, 2, np.broadcast_to(bias.reshape(-1), (channels,)).copy())


def _as_gemm(graph: ir.Graph, node: ir.Node) -> None:
    """x W + b of a tensor with three or more dimensions as reshape, Gemm, reshape: one pass over the result."""
    if node.op_type != "MatMul":
        return
    given, weight, shape = node.inputs[0], constant(node.inputs[1]), shape_of(node.outputs[0])
    if given is None or given.const_value is not None or weight is None or weight.ndim != 2:
        return
    if shape is None or len(shape) < 3 or sum(size is None for size in shape) > 1:
        return
    bias, last = None, node.outputs[0]
    adding = only_reader(last)
    if adding is not None and adding.op_type == "Add" and len(activations(adding)) == 1:
        other = next((value for value in adding.inputs if value is not last), None)
        numbers = constant(other)
        if numbers is not None and numbers.shape == (weight.shape[1],):
            bias, last = other, adding.outputs[0]
    rows = initializer(graph, f"{node.name}/rows", np.array([-1, weight.shape[0]], np.int64))
    back = initializer(graph, f"{node.name}/shape", np.array([-1 if s is None else s for s in shape], np.int64))
    flat = insert(node, "Reshape", [given, rows], f"{node.name}/flat", before=True)
    product = insert(node, "Gemm", [flat, node.inputs[1], bias], f"{node.name}/Gemm", before=True)
    full = insert(node, "Reshape", [product, back], f"{node.name}/full", before=True, like=last)
    known = [size for size in shape[:-1] if size is not None]
    count: int | str = math.prod(known) if len(known) == len(shape) - 1 else "rows"
    flat.shape, flat.type = ir.Shape([count, weight.shape[0]]), given.type
    product.shape, product.type = ir.Shape([count, weight.shape[1]]), last.type
    made = product.producer()
    if made is not None:
        made.meta[ROWS] = math.prod(known)
    replace_uses(last, full)
    for done in (adding, node) if bias is not None else (node,):
        if done is not None:
            remove(done)
