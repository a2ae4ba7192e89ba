"""Reading an exported program: targets, arguments by name, and what its nodes have become so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.graph import Arg, Node, Value
from espalier.graph.operators import TABLE, Operator
from espalier.graph.operators.foreign import foreign
from espalier.graph.operators.schema import DTYPES, dtype_name

_STORED = frozenset(getattr(torch, name) for name in DTYPES)
NOTHING = frozenset(
    ("contiguous", "clone", "detach", "alias", "lift", "lift_fresh", "lift_fresh_copy", "positive", "requires_grad")
)
"""Operators that hand their first argument on: a graph knows no memory layout and no gradient mode."""


def is_free(size: Any) -> bool:
    """Whether a size follows from the batch; export also leaves symbols that it has fixed to a number."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


@dataclass(frozen=True)
class Unsupported:
    """Stands where a value would be whose operator is not in the table; an error once something needs it.

    ``target``: the operator and the module that calls it.
    """

    target: str


@dataclass
class Builder:
    """State of one normalisation: nodes so far and what each exported node became.

    ``foreign``: operators outside the table become nodes that carry them, instead of an error.
    """

    model: nn.Module
    inputs: int
    foreign: bool = False
    nodes: list[Node] = field(default_factory=list)
    environment: dict[fx.Node, Any] = field(default_factory=dict)
    path: str = ""

    def emit(self, op: str, args: Mapping[str, Arg]) -> Value:
        """Append a node, its defaults left out, and return its value."""
        said = {p.name: args[p.name] for p in TABLE[op].parameters if p.name in args and not p.is_default(args[p.name])}
        return self._append(Node(op, said, self.path))

    def emit_foreign(self, overload: torch._ops.OpOverload, args: Mapping[str, Any]) -> Value:
        """Append a node for an operator outside the table; where it runs is for the runner to say."""
        said = {name: value for name, value in args.items() if name != "device"}
        return self._append(Node(foreign(overload).name, said, self.path, overload))

    def _append(self, node: Node) -> Value:
        self.nodes.append(node)
        return Value(self.inputs + len(self.nodes) - 1)

    def read(self, item: Any) -> Any:
        """An exported argument in our terms; values that could not be built come back as Unsupported."""
        if isinstance(item, fx.Node):
            return self.environment.get(item, Unsupported(str(item.target)))
        if isinstance(item, list | tuple):
            return tuple(self.read(x) for x in item)
        if isinstance(item, torch.dtype):
            return item if self.foreign and item not in _STORED else dtype_name(item)
        if isinstance(item, torch.SymInt):
            return int(item)
        return item


def module_path_of(node: fx.Node) -> str:
    """Path of the module an exported node was traced in."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty") else path.split("@")[0]


def target_of(node: fx.Node) -> tuple[str, str, bool]:
    """Full target (``add.Tensor``), plain name (``add``), whether it writes into its first argument."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        full = str(target).removeprefix("aten.")
        plain, _, overload = full.partition(".")
        writes = target._schema.is_mutable and plain.endswith("_") and not plain.endswith("__")
        name = plain[:-1] if writes else plain
        return f"{name}.{overload}", name, writes
    name = getattr(target, "__name__", str(target))
    return f"_operator.{name}", name, False


def bind(builder: Builder, node: fx.Node) -> dict[str, Any]:
    """Arguments of an exported call by torch's names, torch's defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(zip("abcdefgh", (builder.read(a) for a in node.args), strict=False))
    given: dict[str, Any] = {}
    for number, argument in enumerate(node.target._schema.arguments):
        if number < len(node.args):
            given[argument.name] = builder.read(node.args[number])
        elif argument.name in node.kwargs:
            given[argument.name] = builder.read(node.kwargs[argument.name])
        elif argument.has_default_value():
            given[argument.name] = builder.read(argument.default_value)
    return given


def foreign_arguments(builder: Builder, node: fx.Node) -> dict[str, Any]:
    """Arguments of an exported call as given, by torch's names, tensors and sizes replaced by what they became."""
    assert isinstance(node.target, torch._ops.OpOverload)  # noqa: S101 - asked before
    names = [argument.name for argument in node.target._schema.arguments]
    return {
        name: item if isinstance(item, torch.dtype) else builder.read(item)
        for name, item in (*zip(names, node.args, strict=False), *node.kwargs.items())
    }


def first_unsupported(items: Iterable[Any]) -> Unsupported | None:
    """The first of ``items``, lists included, that could not be built."""
    for item in items:
        found = item if isinstance(item, Unsupported) else first_unsupported(item) if isinstance(item, tuple) else None
        if found is not None:
            return found
    return None


_LIST_KINDS = "NIUPGF"


def arguments_of(operator: Operator, given: Mapping[str, Any]) -> dict[str, Arg]:
    """``given`` under our names and in the kinds of the table; arguments the table lacks are dropped."""
    known = {parameter.name: parameter for parameter in operator.parameters}
    arguments: dict[str, Arg] = {}
    for theirs, value in given.items():
        name = operator.rename.get(theirs, theirs)
        if name not in known:
            continue
        kind = known[name].kind
        if kind in _LIST_KINDS and type(value) in (int, float, Value):
            default = known[name].default
            value = (value,) * (len(default) if isinstance(default, tuple) and default else 1)
        if kind in "fF" and value is not None:
            value = tuple(float(v) for v in value) if kind == "F" else float(value)
        arguments[name] = value
    return arguments
