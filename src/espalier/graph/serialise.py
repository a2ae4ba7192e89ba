"""The graph in a file: a few bytes per node, then raw deflate.

    version, names of positional arguments, inputs, call tree
    roles of tensors that are not the usual ones, tied names
    per node: operator code, which optional arguments are given, each by the kind its signature declares
    output tree

References count backwards (1 = the value just before) and tensors forwards from the last one named (0 = the
next), so the repeated blocks of a network become repeated bytes, which deflate stores once. Tensor names,
shapes and dtypes are not stored: the file around the graph lists them, and both sides count in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.core.errors import Corrupt, FileError, ModelError, UnsupportedVersion, UsageError
from espalier.graph.check import DEFAULT_LIMITS, MAX_RANK, Limits, infer
from espalier.graph.codec import Reader, Writer, deflate, inflate, unzigzag, zigzag
from espalier.graph.graph import (
    KINDS,
    ROLES,
    Arg,
    Branch,
    Graph,
    Input,
    Node,
    TensorSpec,
    Tree,
    Value,
    Weight,
    usual_role,
)
from espalier.graph.operators import BY_CODE, TABLE, Operator
from espalier.graph.operators.schema import DTYPES, MAX_LIST, Parameter

VERSION = 1
_LISTS = {"N": "n", "I": "i", "U": "i", "P": "i", "F": "f", "L": "T"}
_LEAVES = ("value", "weight", "none", "false", "true", "int", "float", "text")


def dumps(graph: Graph, *, names: Sequence[str] | None = None) -> bytes:
    """``graph`` as bytes; ``names`` are the tensor names in the order the reader will know them.

    The order defaults to that of ``graph.tensors``, then ``graph.aliases``. Raises UsageError when ``names``
    lacks a tensor of the graph or lists one twice.
    """
    order = list(names) if names is not None else [*graph.tensors, *graph.aliases]
    missing = [name for name in (*graph.tensors, *graph.aliases) if name not in set(order)]
    if missing or len(set(order)) != len(order):
        raise UsageError(f"names must list every tensor of the graph once; missing: {missing[:5]}.")
    return deflate(_GraphWriter(graph, order).write())


def loads(data: bytes, *, tensors: Mapping[str, tuple[tuple[int, ...], str]], limits: Limits = DEFAULT_LIMITS) -> Graph:
    """The graph in ``data``; ``tensors`` are name -> (shape, dtype) in the order ``dumps`` was given.

    The whole graph is checked and every shape inferred before it is returned. Raises UnsupportedVersion,
    Corrupt or LimitExceeded; nothing else, whatever the bytes.
    """
    plain = inflate(data, limits.bytes)
    try:
        graph = _GraphReader(plain, tensors, limits).read()
        infer(graph, limits=limits)
    except FileError:
        raise
    except ModelError as error:
        raise Corrupt(f"The graph is not well formed: {error}") from error
    return graph


class _GraphWriter(Writer):
    def __init__(self, graph: Graph, names: Sequence[str]) -> None:
        super().__init__()
        self.graph = graph
        self.names = names
        self.numbers = {name: number for number, name in enumerate(names)}
        self.next_tensor = 0
        self.here = 0

    def write(self) -> bytes:
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
        operator = TABLE[node.op]
        self.number(operator.code)
        optional = [p for p in operator.parameters if not p.required]
        if optional:
            self.number(sum(1 << k for k, p in enumerate(optional) if p.name in node.args))
        for parameter in operator.parameters:
            if parameter.name in node.args:
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
        elif kind in _LISTS:
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
            self._scalar(_LISTS[kind], item)

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
            self.number(len(_LEAVES) + KINDS.index(tree.kind) + len(KINDS) * len(tree.children))
            for key in tree.keys:
                self.number(isinstance(key, int))
                self.signed(key) if isinstance(key, int) else self.text(key)
            for child in tree.children:
                self._tree(child)
            return
        leaf = _leaf_kind(tree)
        self.number(_LEAVES.index(leaf))
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


class _GraphReader(Reader):
    def __init__(self, data: bytes, tensors: Mapping[str, tuple[tuple[int, ...], str]], limits: Limits) -> None:
        super().__init__(data)
        self.tensors = tensors
        self.names = list(tensors)
        self.limits = limits
        self.next_tensor = 0
        self.here = 0

    def read(self) -> Graph:
        version = self.number()
        if version != VERSION:
            raise UnsupportedVersion(f"The graph has version {version}; this reader knows {VERSION}. Update espalier.")
        names = tuple(self.text() for _ in range(self.count(MAX_LIST)))
        inputs = tuple(self._input() for _ in range(self.count(MAX_LIST)))
        call = self._tree(self.limits.depth)
        specs, aliases = self._tensors()
        nodes: list[Node] = []
        for number in range(self.count(2**40)):
            if number >= self.limits.nodes:
                raise Corrupt(f"The graph has more than {self.limits.nodes} nodes.")
            self.here = len(inputs) + number
            nodes.append(self._node())
        self.here = len(inputs) + len(nodes)
        output = self._tree(self.limits.depth)
        self.end()
        if not isinstance(call, Branch):
            raise Corrupt("The graph has no call tree.")
        return Graph(
            inputs=inputs, call=call, names=names, nodes=tuple(nodes), output=output, tensors=specs, aliases=aliases
        )

    def _input(self) -> Input:
        dtype, rank = divmod(self.number(len(DTYPES) * (MAX_RANK + 1) - 1), MAX_RANK + 1)
        sizes = [self.number() for _ in range(rank)]
        return Input(tuple(None if n == 0 else n - 1 for n in sizes), DTYPES[dtype])

    def _tensors(self) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        roles = {name: usual_role(name, dtype) for name, (_, dtype) in self.tensors.items()}
        number = 0
        for _ in range(self.count(len(self.names))):
            step, role = divmod(self.number(), len(ROLES))
            number += step
            roles[self._name(number)] = ROLES[role]
        aliases = {}
        for _ in range(self.count(len(self.names))):
            alias = self._name(self.number())
            aliases[alias] = self._name(self.number())
        specs = {
            name: TensorSpec(tuple(shape), dtype, roles[name])
            for name, (shape, dtype) in self.tensors.items()
            if name not in aliases
        }
        return specs, aliases

    def _name(self, number: int) -> str:
        if not 0 <= number < len(self.names):
            raise Corrupt(f"The graph refers to tensor {number}; the file has {len(self.names)}.")
        return self.names[number]

    def _node(self) -> Node:
        code = self.number()
        operator = BY_CODE.get(code)
        if operator is None:
            raise Corrupt(f"The graph uses operator {code}, which is not in the table.")
        return Node(operator.name, self._args(operator))

    def _args(self, operator: Operator) -> dict[str, Arg]:
        optional = [p for p in operator.parameters if not p.required]
        mask = self.number((1 << len(optional)) - 1) if optional else 0
        given = {p.name for k, p in enumerate(optional) if mask >> k & 1}
        return {p.name: self._arg(p) for p in operator.parameters if p.required or p.name in given}

    def _reference(self, code: int) -> Value | Weight:
        if code & 1:
            return Value(self._back((code + 1) // 2))
        number = self.next_tensor + unzigzag(code // 2)
        name = self._name(number)
        self.next_tensor = number + 1
        return Weight(name)

    def _back(self, distance: int) -> int:
        if not 1 <= distance <= self.here:
            raise Corrupt(f"Value {self.here} of the graph refers {distance} values back.")
        return self.here - distance

    def _arg(self, parameter: Parameter) -> Arg:
        kind = parameter.kind
        if parameter.words:
            number = self.number(len(parameter.words))
            return parameter.words[number - 1] if number else None
        if kind == "G":
            return self._list("U", words=("same", "valid"))
        return self._list(kind) if kind in _LISTS else self._scalar(kind)

    def _list(self, kind: str, words: tuple[str, ...] = ()) -> Arg:
        header = self.number(2 * MAX_LIST + 2)
        if header == 0:
            return None
        if words and header > MAX_LIST:
            if header - MAX_LIST - 1 >= len(words):
                raise Corrupt(f"The graph holds a list of {header} entries.")
            return words[header - MAX_LIST - 1]
        length, same = divmod(header - 1, 2)
        if same:
            return (self._scalar(_LISTS[kind]),) * length
        return tuple(self._scalar(_LISTS[kind]) for _ in range(length))

    def _scalar(self, kind: str) -> Arg:
        if kind in "TV":
            code = self.number()
            return self._reference(code - 1) if code else None
        if kind == "n":
            code = self.number()
            return Value(self._back((code + 1) // 2)) if code & 1 else unzigzag(code // 2)
        if kind in "O#":
            code = self.number()
            return self._reference(code - 1) if code else self._number()
        if kind in "iup":
            code = self.number()
            return unzigzag(code - 1) if code else None
        if kind == "f":
            return self.real() if self.number(1) else None
        if kind == "b":
            return bool(self.number(1))
        if kind == "d":
            code = self.number(len(DTYPES))
            return DTYPES[code - 1] if code else None
        return self.text()

    def _number(self) -> Arg:
        kind = self.number(4)
        if kind == 1:
            return bool(self.signed())
        if kind == 4:
            return Value(self._back(self.number()))
        return None if kind == 0 else self.signed() if kind == 2 else self.real()

    def _tree(self, depth: int) -> Tree:
        if depth < 0:
            raise Corrupt("The graph's arguments or results are nested too deeply.")
        code = self.number()
        if code >= len(_LEAVES):
            count, kind = divmod(code - len(_LEAVES), len(KINDS))
            if count > len(self.data) - self.position:
                raise Corrupt(f"The graph announces {count} entries, more than it has bytes.")
            keyed = KINDS[kind] in ("dict", "namedtuple")
            keys = tuple(self.signed() if self.number(1) else self.text() for _ in range(count if keyed else 0))
            return Branch(KINDS[kind], tuple(self._tree(depth - 1) for _ in range(count)), keys)
        return self._leaf(_LEAVES[code])

    def _leaf(self, leaf: str) -> Tree:
        if leaf == "value":
            return Value(self._back(self.number()) if self.here else self.number())
        if leaf == "weight":
            return Weight(self._name(self.number()))
        if leaf == "text":
            return self.text()
        if leaf in ("int", "float"):
            return self.signed() if leaf == "int" else self.real()
        return {"none": None, "false": False, "true": True}[leaf]
