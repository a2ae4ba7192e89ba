"""Which feature maps are flattened into linear layers, read from the model's graph."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.model import device_of
from espalier.core.parametrize import plain
from espalier.core.task import capture_call, to_device
from espalier.graph import trace
from espalier.graph.check import infer
from espalier.graph.graph import Node, Value, Weight

FLATTENING = ("flatten", "reshape")
MOVING = ("permute", "transpose", "movedim")
"""What stands before the flattening of a map whose channels are last."""
ONE_BY_ONE = frozenset({
    "dropout", "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "leaky_relu", "elu", "softplus",
})  # fmt: skip
"""Operators that may stand between the flattening and the linear layer: they work on each number alone."""


def feature_maps(model: nn.Module, context: Context) -> dict[str, tuple[int, ...]]:
    """Path of a linear layer -> ``(channels, height, width)`` of the map that was flattened into its input.

    Only maps of more than one place, channels first. A model that cannot be traced has none, which is noted.
    """
    bare = plain(model)
    args, kwargs = capture_call(context.data, bare, to_device(context.data.example(), device_of(bare)))
    try:
        graph = trace(bare, args, kwargs)
        values = infer(graph)
    except ModelError as error:
        context.note(f"which feature maps are flattened is not known: {error}")
        return {}
    producers = {len(graph.inputs) + number: node for number, node in enumerate(graph.nodes)}
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        weight, source = node.args.get("weight"), node.args.get("input")
        if node.op != "linear" or not isinstance(weight, Weight):
            continue
        flattening = _maker(source, producers)
        source = None if flattening is None else _first(flattening)
        if flattening is None or flattening.op not in FLATTENING or source is None:
            continue
        before = _maker(source, producers)
        if before is None or before.op not in MOVING:
            shape = tuple(values[source.index].shape)
            flat = graph.tensors[weight.name].shape[1]
            if len(shape) == 4 and math.prod(shape[1:]) == flat and math.prod(shape[2:]) > 1:
                found[weight.name.rpartition(".")[0]] = tuple(int(n) for n in shape[1:])
    return found


def _first(node: Node) -> Value | None:
    return next((arg for arg in node.args.values() if isinstance(arg, Value)), None)


def _maker(value: Any, producers: dict[int, Node]) -> Node | None:
    """The node that ``value`` comes from, behind operators that work on each number alone; None for an input."""
    while isinstance(value, Value) and (node := producers.get(value.index)) is not None:
        if node.op not in ONE_BY_ONE:
            return node
        value = _first(node)
    return None
