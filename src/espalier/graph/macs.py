"""Multiply-accumulates of a graph: of convolutions, matrix products, attention and recurrence; all else is 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from espalier.graph.check import infer, resolve, with_defaults
from espalier.graph.graph import Graph, Weight, references
from espalier.graph.operators import operator_of


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one call: ``total``, per node, and per tensor that takes part in them."""

    total: int
    nodes: tuple[int, ...]
    tensors: Mapping[str, int]


def macs(graph: Graph, *, batch: int = 1) -> Macs:
    """Multiply-accumulates of ``graph`` for ``batch`` samples; biases and elementwise operators count nothing.

    A node's count is credited to its largest tensor, a recurrence's to its matrices by their size.
    """
    values = infer(graph, batch=batch)
    blank = {name: torch.empty(spec.shape, device="meta") for name, spec in graph.tensors.items()}
    counts: list[int] = []
    tensors: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        operator = operator_of(node)
        if operator.macs is None:
            counts.append(0)
            continue
        arguments = with_defaults(operator, resolve(operator, node, values, blank))
        count = operator.macs(arguments, values[len(graph.inputs) + number])
        counts.append(count)
        matrices = [a.name for a in references(node) if isinstance(a, Weight) and blank[a.name].dim() > 1]
        weights = sum(blank[name].numel() for name in matrices)
        for name in matrices:
            tensors[name] = tensors.get(name, 0) + count * blank[name].numel() // max(weights, 1)
    return Macs(sum(counts), tuple(counts), tensors)
