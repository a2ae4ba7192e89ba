"""One traced graph as data: traced, checked, counted, stored in a few bytes, run again and trained; and taps."""

from __future__ import annotations

from espalier.graph.check import Limits, infer
from espalier.graph.edit import AsGraph
from espalier.graph.graph import Graph, Input, Node, TensorSpec, Value, Weight
from espalier.graph.macs import Macs, macs
from espalier.graph.operators import TABLE, Operator
from espalier.graph.runner import Runner
from espalier.graph.serialise import dumps, loads
from espalier.graph.taps import Place, Taps, list_places
from espalier.graph.trace import trace

__all__ = [
    "TABLE",
    "AsGraph",
    "Graph",
    "Input",
    "Limits",
    "Macs",
    "Node",
    "Operator",
    "Place",
    "Runner",
    "Taps",
    "TensorSpec",
    "Value",
    "Weight",
    "dumps",
    "infer",
    "list_places",
    "loads",
    "macs",
    "trace",
]
