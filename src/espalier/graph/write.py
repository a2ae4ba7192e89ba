"""Writes the layout that ``serialise`` describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espalier.graph.check import MAX_RANK
from espalier.graph.codec import Writer, zigzag
from espalier.graph.graph import KINDS, ROLES, Arg, Branch, Graph, Input, Node, Tree, Value, Weight, usual_role
from espalier.graph.operators import TABLE
from espalier.graph.operators.foreign import outside, shown
from espalier.graph.operators.schema import DTYPES, MAX_LIST, Parameter

VERSION = 1
LISTS = {"N": "n", "I": "i", "U": "i", "P": "i", "F": "f", "L": "T"}
LEAVES = ("value", "weight", "none", "false", "true", "int", "float", "text")


class GraphWriter(Writer):
    """One graph to bytes; ``names`` number its tensors."""

    def __init__(self, graph: Graph, names: Sequence[str]) -> None:
        super().__init__()
        self.graph = graph
        self.names = names
        self.numbers = {name: number for number, name in enumerate(names)}
        self.next_tensor = 0
        self.here = 0

    def write(self) -> bytes:
        """The whole graph, not yet deflated."""
        graph = self.graph
        self.number(VERSION)
        self.number(len(graph.names))
        for name in graph.names:
            self.text(name)
        self.number(len(graph.inputs))
        for item in graph.inputs:
            self._input(item)
        self._tree(graph.call)
        self._tensors()
        self.number(len(graph.nodes))
        for number, node in enumerate(graph.nodes):
            self.here = len(graph.inputs) + number
            self._node(node)
        self.here = len(graph.inputs) + len(graph.nodes)
        self._tree(graph.output)
        return bytes(self.data)

    def _input(self, item: Input) -> None:
        self.number(DTYPES.index(item.dtype) * (MAX_RANK + 1) + len(item.shape))
        for size in item.shape:
            self.number(0 if size is None else size + 1)

    def _tensors(self) -> None:
        """Tensors whose role their name does not tell, and tied names: usually none of either."""
        odd = [
            (self.numbers[name], ROLES.index(spec.role))
            for name, spec in self.graph.tensors.items()
            if spec.role != usual_role(name, spec.dtype)
        ]
        self.number(len(odd))
        previous = 0
        for number, role in sorted(odd):
            self.number((number - previous) * len(ROLES) + role)
            previous = number
        self.number(len(self.graph.aliases))
        for alias, name in self.graph.aliases.items():
            self.number(self.numbers[alias])
            self.number(self.numbers[name])

    def _node(self, node: Node) -> None:
        if node.overload is not None:
            raise outside(shown(node.op, node.path))
        operator = TABLE[node.op]
        given = {p.name for p in operator.parameters if p.name in node.args and not p.is_default(node.args[p.name])}
        self.number(operator.code)
        optional = [p for p in operator.parameters if not p.required]
        if optional:
            self.number(sum(1 << k for k, p in enumerate(optional) if p.name in given))
        for parameter in operator.parameters:
            if parameter.name in given:
                self._arg(parameter, node.args[parameter.name])

    def _reference(self, arg: Value | Weight) -> int:
        """Odd: how many values back; even: how far from the tensor after the one named last."""
        if isinstance(arg, Value):
            return 2 * (self.here - arg.index) - 1
        number = self.numbers[arg.name]
        code = 2 * zigzag(number - self.next_tensor)
        self.next_tensor = number + 1
        return code

    def _arg(self, parameter: Parameter, value: Any) -> None:
        kind = parameter.kind
        if parameter.words:
            self.number(0 if value is None else 1 + parameter.words.index(value))
        elif kind == "G":
            self.number(MAX_LIST + 1 + ("same", "valid").index(value)) if isinstance(value, str) else self._list(
                "U", value
            )
        elif kind in LISTS:
            self._list(kind, value)
        else:
            self._scalar(kind, value)

    def _list(self, kind: str, value: tuple[Arg, ...] | None) -> None:
        """0 for None; else length and entries, or - low bit set - length and the one entry all share."""
        if value is None:
            self.number(0)
            return
        same = len(value) > 1 and kind != "L" and all(item == value[0] for item in value)
        self.number(1 + 2 * len(value) + same)
        for item in value[:1] if same else value:
            self._scalar(LISTS[kind], item)

    def _scalar(self, kind: str, value: Any) -> None:
        """One argument; None is 0 where the kind leaves room for it."""
        if kind in "TV":
            self.number(0 if value is None else 1 + self._reference(value))
        elif kind == "O" and isinstance(value, Value | Weight):
            self.number(1 + self._reference(value))
        elif kind == "n":
            self.number(2 * (self.here - value.index) - 1 if isinstance(value, Value) else 2 * zigzag(value))
        elif kind in "O#":
            self.number(0)
            self._number(value)
        elif kind in "iup":
            self.number(0 if value is None else 1 + zigzag(value))
        elif kind == "f":
            self.number(value is not None)
            if value is not None:
                self.real(value)
        elif kind == "b":
            self.number(value)
        elif kind == "d":
            self.number(0 if value is None else 1 + DTYPES.index(value))
        else:
            self.text(value)

    def _number(self, value: Any) -> None:
        kind = next(k for k, t in enumerate((type(None), bool, int, float, Value)) if type(value) is t)
        self.number(kind)
        if kind in (1, 2):
            self.signed(value)
        elif kind == 3:
            self.real(value)
        elif kind == 4:
            self.number(self.here - value.index)

    def _tree(self, tree: Tree) -> None:
        """Leaves take the numbers 0 to 7, containers the numbers after them."""
        if isinstance(tree, Branch):
            self.number(len(LEAVES) + KINDS.index(tree.kind) + len(KINDS) * len(tree.children))
            for key in tree.keys:
                self.number(isinstance(key, int))
                self.signed(key) if isinstance(key, int) else self.text(key)
            for child in tree.children:
                self._tree(child)
            return
        leaf = _leaf_kind(tree)
        self.number(LEAVES.index(leaf))
        if isinstance(tree, Value):
            self.number(tree.index if self.here == 0 else self.here - tree.index)
        elif isinstance(tree, Weight):
            self.number(self.numbers[tree.name])
        elif leaf == "int":
            self.signed(tree)  # type: ignore[arg-type]
        elif isinstance(tree, float):
            self.real(tree)
        elif isinstance(tree, str):
            self.text(tree)


def _leaf_kind(leaf: Tree) -> str:
    if leaf is None or isinstance(leaf, bool):
        return {None: "none", False: "false", True: "true"}[leaf]
    types = ((Value, "value"), (Weight, "weight"), (int, "int"), (float, "float"), (str, "text"))
    return next(name for cls, name in types if isinstance(leaf, cls))
