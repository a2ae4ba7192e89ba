"""Small steps on an ONNX graph held by ``onnx_ir``: constants, new nodes, what reads a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from espalier.deploy.runtimes import Array


def constant(value: ir.Value | None) -> Array | None:
    """The numbers of an initializer; None for anything computed or given."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, where nothing else does and it is no output of the graph."""
    found = readers(value)
    return found[0] if len(found) == 1 and not value.is_graph_output() else None


def activations(node: ir.Node) -> list[ir.Value]:
    """The inputs of ``node`` that are computed or given, not constant."""
    return [value for value in node.inputs if value is not None and value.const_value is None]


def shape_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Sizes of a value, None for an open one; None where even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def cut_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Where a Relu or Clip cuts; None where that is computed."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = []
    for index, missing in ((1, float("-inf")), (2, float("inf"))):
        value = node.inputs[index] if len(node.inputs) > index else None
        found = constant(value)
        if value is not None and found is None:
            return None
        ends.append(missing if found is None else float(found.reshape(())))
    return ends[0], ends[1]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new constant of the graph, or the one that has this name already and the same numbers."""
    while (there := graph.initializers.get(name)) is not None:
        known = constant(there)
        if known is not None and known.dtype == array.dtype and np.array_equal(known, array):
            return there
        name += "_"
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.initializers[name] = value
    return value


def insert(
    place: ir.Node | ir.Graph, op: str, inputs: Sequence[ir.Value | None], name: str,
    attributes: Mapping[str, Any] | None = None, *, like: ir.Value | None = None, dtype: ir.DataType | None = None,
    before: bool = False,
) -> ir.Value:  # fmt: skip
    """A new node after (or before) ``place``, or first in the graph; returns its result, ``name`` of both.

    ``like``: a value of the result's shape and dtype; ``dtype`` where that is another one.
    """
    out = ir.Value(name=name)
    if like is not None:
        out.shape, out.type = like.shape, like.type if dtype is None else ir.TensorType(dtype)
    node = ir.node(op, list(inputs), attributes or {}, outputs=[out], name=name)
    if isinstance(place, ir.Graph):
        first = next(iter(place), None)
        place.append(node) if first is None else place.insert_before(first, node)
    elif place.graph is not None:
        (place.graph.insert_before if before else place.graph.insert_after)(place, node)
    return out


def replace_uses(old: ir.Value, new: ir.Value, among: Sequence[ir.Node] | None = None, *, outputs: bool = True) -> None:
    """Let the readers of ``old`` (or only those ``among`` them) read ``new``, and with ``outputs`` the graph's result.

    A result keeps its name.
    """
    for node, index in tuple(old.uses()):
        if among is None or node in among:
            node.replace_input_with(index, new)
    graph = old.graph
    if not outputs or graph is None or not old.is_graph_output():
        return
    for place, value in enumerate(graph.outputs):
        if value is old:
            name, old.name = old.name, f"{old.name}/float"
            new.name, new.shape, new.type = name, old.shape, old.type
            graph.outputs[place] = new


def remove(node: ir.Node) -> None:
    """Take a node out whose results nothing reads."""
    if node.graph is not None:
        node.graph.remove(node, safe=True)
