"""What a graph costs without some channels, from the labels alone: nothing is traced, built or run."""

from __future__ import annotations

from typing import Any

import torch

from espalier.graph.channels.atoms import Labels
from espalier.graph.channels.flow import Flow
from espalier.graph.channels.groups import kept_sizes
from espalier.graph.channels.rewrite import Gone, rewritten_node
from espalier.graph.check import with_defaults
from espalier.graph.operators import operator_of


def parameters(flow: Flow, gone: Gone) -> int:
    """Parameters left, tied ones once."""
    total = 0
    for name, spec in flow.graph.tensors.items():
        if spec.role in ("parameter", "frozen"):
            shape = kept_sizes(flow.tensors[name], gone) if name in flow.tensors else spec.shape
            count = 1
            for size in shape:
                count *= size
            total += count
    return total


def multiply_adds(flow: Flow, gone: Gone) -> float:
    """Multiply-accumulates left for one sample (the analysis runs several; dynamic graphs scale with the batch)."""
    total = 0
    for number, node in enumerate(flow.graph.nodes):
        operator = operator_of(node)
        if operator.macs is None:
            continue
        small = rewritten_node(flow, number, gone)
        arguments = with_defaults(operator, {name: _blank(flow.look_up(arg), gone) for name, arg in small.args.items()})
        out = flow.values[len(flow.graph.inputs) + number]
        total += operator.macs(arguments, _blank(out, gone))
    batch = next((labels.shape[item.shape.index(None)] for labels, item in
                  zip(flow.values, flow.graph.inputs, strict=False) if None in item.shape), 1)  # fmt: skip
    return total / batch


def _blank(thing: Any, gone: Gone) -> Any:
    if isinstance(thing, Labels):
        return torch.empty(kept_sizes(thing, gone), device="meta")
    return tuple(_blank(item, gone) for item in thing) if isinstance(thing, tuple) else thing
