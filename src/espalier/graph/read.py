"""Reads the layout that ``serialise`` describes, trusting nothing."""

from __future__ import annotations

from collections.abc import Mapping

from espalier.core.errors import Corrupt, UnsupportedVersion
from espalier.graph.check import MAX_RANK, Limits
from espalier.graph.codec import Reader, unzigzag
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
from espalier.graph.operators import BY_CODE, Operator
from espalier.graph.operators.schema import DTYPES, MAX_LIST, Parameter
from espalier.graph.write import LEAVES, LISTS, VERSION


class GraphReader(Reader):
    """One graph from bytes; ``tensors`` are name -> (shape, dtype) in the order the writer was given."""

    def __init__(self, data: bytes, tensors: Mapping[str, tuple[tuple[int, ...], str]], limits: Limits) -> None:
        super().__init__(data)
        self.tensors = tensors
        self.names = list(tensors)
        self.limits = limits
        self.next_tensor = 0
        self.here = 0

    def read(self) -> Graph:
        """The graph, well formed as far as bytes go; shapes and arguments are checked by ``infer``."""
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
        return self._list(kind) if kind in LISTS else self._scalar(kind)

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
            return (self._scalar(LISTS[kind]),) * length
        return tuple(self._scalar(LISTS[kind]) for _ in range(length))

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
        if code >= len(LEAVES):
            count, kind = divmod(code - len(LEAVES), len(KINDS))
            if count > len(self.data) - self.position:
                raise Corrupt(f"The graph announces {count} entries, more than it has bytes.")
            keyed = KINDS[kind] in ("dict", "namedtuple")
            keys = tuple(self.signed() if self.number(1) else self.text() for _ in range(count if keyed else 0))
            return Branch(KINDS[kind], tuple(self._tree(depth - 1) for _ in range(count)), keys)
        return self._leaf(LEAVES[code])

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
