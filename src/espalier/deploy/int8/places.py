"""Which tensors get a grid, and which operators run in int8 because of that.

From the products (convolutions, linear layers, attention) outwards. Their inputs need a grid. Additions, concatenations
and pools between them join where all they read and what they give can have one, so that nothing goes back to fp32 on
the way. One tensor has one grid; tensors that a pool or reshape only moves, and all parts of a concatenation, share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_ir as ir

from espalier.core.errors import UnknownNameError, did_you_mean
from espalier.deploy.int8.network import activations, attribute, constant, only_reader, readers
from espalier.deploy.int8.profile import CARRY, RuntimeProfile
from espalier.deploy.int8.trained import is_marker

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"}) | RECURRENT


@dataclass
class Places:
    """``products`` and ``follow`` run in int8; ``left`` maps the other products to the reason.

    ``results``: the products that only run in int8 when what they give is on a grid for all that reads it.
    ``values``: every tensor with a grid, in the order of the graph; ``leader[v]`` is the tensor whose grid ``v`` has;
    ``symmetric`` are the leaders whose grid has zero point 0.
    """

    products: list[ir.Node] = field(default_factory=list)
    results: set[ir.Node] = field(default_factory=set)
    follow: list[ir.Node] = field(default_factory=list)
    left: dict[ir.Node, str] = field(default_factory=dict)
    values: list[ir.Value] = field(default_factory=list)
    leader: dict[ir.Value, ir.Value] = field(default_factory=dict)
    symmetric: set[ir.Value] = field(default_factory=set)

    def groups(self) -> dict[ir.Value, list[ir.Value]]:
        """Leader -> all tensors on its grid."""
        found: dict[ir.Value, list[ir.Value]] = {}
        for value in self.values:
            found.setdefault(self.leader[value], []).append(value)
        return found


def layer_name(node: ir.Node) -> str:
    """The path of the module that owns the weight of ``node`` or made it, else the node's own name."""
    weight = str(node.inputs[1].name).partition("/")[0] if len(node.inputs) > 1 and node.inputs[1] is not None else ""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    path, slash, _ = str(node.name).partition("/")
    return path if slash else str(node.name)


def places(graph: ir.Graph, profile: RuntimeProfile, keep_fp32: Sequence[str] = ()) -> Places:
    """Choose under ``profile``; layers whose name or path fits a pattern of ``keep_fp32`` stay in fp32.

    Raises ``UnknownNameError`` for a pattern that nothing answers to.
    """
    return _Choice(graph, profile, keep_fp32).made()


class _Choice:
    def __init__(self, graph: ir.Graph, profile: RuntimeProfile, keep_fp32: Sequence[str]) -> None:
        self.graph, self.profile = graph, profile
        self.nodes = list(graph)
        self.found = Places()
        self.chosen: dict[ir.Value, None] = {}
        self.parent: dict[ir.Value, ir.Value] = {}
        self.kept = self._kept(keep_fp32)

    def made(self) -> Places:
        for node in self.nodes:
            if node.op_type in PRODUCTS and not node.domain:
                reason = self._why_not(node)
                if reason:
                    self.found.left[node] = reason
                else:
                    self.found.products.append(node)
        for node in self.found.products:
            for value in activations(node):
                self._choose(value)
            result = node.outputs[0]
            cut = tail(result) is not result
            if node.op_type in self.profile.needs_result or (cut and node.op_type in self.profile.needs_cut_result):
                self.found.results.add(node)
                self._choose(tail(result))
        useful = self._useful()
        for node in self.nodes:
            if node.op_type in self.profile.follow and useful.get(node.outputs[0]) and self._can_follow(node):
                self.found.follow.append(node)
                for value in (*activations(node), tail(node.outputs[0])):
                    self._choose(value)
        self._carry()
        self._concatenations()
        order = {value: n for n, value in enumerate(self._all_values())}
        self.found.values = sorted(self.chosen, key=order.__getitem__)
        self.found.leader = {value: self._find(value) for value in self.found.values}
        if self.profile.symmetric_pairs:
            pairs = [node for node in self.found.products if len(activations(node)) > 1]
            operands = [value for node in pairs for value in activations(node) if value in self.chosen]
            self.found.symmetric = {self._find(value) for value in operands}
        return self.found

    def _kept(self, patterns: Sequence[str]) -> set[ir.Node]:
        names: dict[str, list[ir.Node]] = {}
        for node in self.nodes:
            for name in (str(node.name), layer_name(node), *(str(value.name) for value in node.outputs)):
                names.setdefault(name, []).append(node)
        kept: set[ir.Node] = set()
        for pattern in patterns:
            matched = [node for name, nodes in names.items() if fnmatchcase(name, pattern) for node in nodes]
            if not matched:
                layers = {layer_name(node): None for node in self.nodes if node.op_type in PRODUCTS}
                raise UnknownNameError(f"no layer answers to keep_fp32 {pattern!r}.{did_you_mean(pattern, layers)}")
            kept.update(matched)
            for node in matched:  # a tensor that is named: the layers that read it
                if pattern in {str(value.name) for value in node.outputs}:
                    kept.update(reader for value in node.outputs for reader in _through(value))
        return kept

    def _why_not(self, node: ir.Node) -> str:
        """Why a product stays in fp32; empty where it can run in int8."""
        if node in self.kept:
            return "kept in fp32 as asked"
        if node.op_type in RECURRENT:
            return f"{node.op_type} has no int8 form in an ONNX file"
        if node.op_type not in self.profile.products:
            return f"{self.profile.name} has no int8 {node.op_type}"
        weight, given = node.inputs[1], node.inputs[0]
        if given is None or weight is None or given.const_value is not None:
            return "its left operand is constant"
        if weight.const_value is None and node.op_type != "MatMul":
            return "its weight is computed, not constant"
        numbers = constant(weight)
        if numbers is not None and node.op_type == "MatMul" and numbers.ndim != 2:
            return f"its constant has {numbers.ndim} axes; int8 products need 2"
        if node.op_type == "Gemm":
            if attribute(node, "transA", 0):
                return "its input is transposed"
            if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
                return "its bias is computed, not constant"
        return ""

    def _choose(self, value: ir.Value) -> None:
        """Give ``value`` a grid, as far up as operators that only move numbers allow."""
        if is_marker(only_reader(value)) or is_marker(_source(value)):
            return
        self.chosen.setdefault(value)
        producer = value.producer()
        if producer is not None and producer.op_type in CARRY and not producer.domain:
            source = producer.inputs[0]
            if source is not None and source.const_value is None:
                self._choose(source)

    def _useful(self) -> dict[ir.Value, bool]:
        """Which tensors reach a product in int8 through operators that keep or follow a grid."""
        products = set(self.found.products)
        found: dict[ir.Value, bool] = {}
        for node in reversed(self.nodes):
            passes = node.op_type in CARRY | self.profile.follow | {"Relu", "Clip"} or is_marker(node)
            reaches = node in products or (passes and any(found.get(value) for value in node.outputs))
            for value in node.inputs:
                if value is not None and reaches:
                    found[value] = True
        return found

    def _can_follow(self, node: ir.Node) -> bool:
        if node in self.kept or any(value is not None and value.dtype != ir.DataType.FLOAT for value in node.outputs):
            return False
        if len(activations(node)) != len([value for value in node.inputs if value is not None]):
            return False
        if node.op_type == "Mul" and "Sigmoid" not in self.profile.follow and _is_silu(node):
            return False
        return all(self._has_or_may(value) for value in activations(node))

    def _has_or_may(self, value: ir.Value) -> bool:
        """Whether a tensor has a grid or comes from an operator that can give its result on one."""
        while value not in self.chosen:
            producer = value.producer()
            if producer is None:
                return False
            if is_marker(producer):
                return True
            if producer in self.found.follow:
                return True
            if producer in self.found.products:
                return producer.op_type in ("Conv", "ConvTranspose", "Gemm")
            if producer.op_type == "Sigmoid":
                return self._has_or_may(activations(producer)[0])
            if producer.op_type not in CARRY | {"Relu", "Clip"} or producer.inputs[0] is None:
                return False
            value = producer.inputs[0]
        return True

    def _carry(self) -> None:
        """A grid passes through what only moves numbers, where both ends have one."""
        for node in self.nodes:
            if node.op_type in CARRY and not node.domain and node.inputs[0] is not None:
                self._join(node.inputs[0], node.outputs[0])

    def _concatenations(self) -> None:
        for node in self.found.follow:
            if node.op_type == "Concat":
                for value in activations(node):
                    self._join(value, tail(node.outputs[0]))

    def _join(self, one: ir.Value, other: ir.Value) -> None:
        if one in self.chosen and other in self.chosen:
            self.parent[self._find(other)] = self._find(one)

    def _find(self, value: ir.Value) -> ir.Value:
        while self.parent.get(value, value) is not value:
            value = self.parent[value]
        return value

    def _all_values(self) -> Iterable[ir.Value]:
        yield from self.graph.inputs
        for node in self.nodes:
            yield from node.outputs


def tail(value: ir.Value) -> ir.Value:
    """``value`` after the Relu or Clip that runtimes compute together with the layer before."""
    reader = only_reader(value)
    if reader is not None and reader.op_type in ("Relu", "Clip") and reader.inputs[0] is value:
        return reader.outputs[0]
    return value


def _source(value: ir.Value) -> ir.Node | None:
    """What made the numbers of ``value``, before operators that only move them."""
    made = value.producer()
    while made is not None and made.op_type in CARRY and not made.domain and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    return made


def _is_silu(node: ir.Node) -> bool:
    """x sigmoid(x), which some runtimes compute as one operator."""
    return any(
        (producer := value.producer()) is not None
        and producer.op_type in ("Sigmoid", "HardSigmoid")
        and producer.inputs[0] in node.inputs
        for value in node.inputs
        if value is not None
    )


def _through(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, also behind what only moves numbers."""
    found = []
    for node in readers(value):
        found.append(node)
        if node.op_type in CARRY:
            found += [reader for out in node.outputs for reader in _through(out)]
    return found
