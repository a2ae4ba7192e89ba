"""The traced graph: plain frozen data, nothing that runs.

Values are numbered: first the input tensors, then one value per node, so a node may only refer to what
stands before it. Tensors are named as in ``state_dict()``; everything else a node needs is a literal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

Role = Literal["parameter", "frozen", "buffer", "constant"]
ROLES: tuple[Role, ...] = ("parameter", "frozen", "buffer", "constant")
CONSTANT_PREFIX = "_constant."
_BUFFER_NAMES = frozenset({"running_mean", "running_var", "num_batches_tracked"})

Kind = Literal["tuple", "list", "dict", "namedtuple"]
KINDS: tuple[Kind, ...] = ("tuple", "list", "dict", "namedtuple")


@dataclass(frozen=True)
class Value:
    """Reference to value number ``index``: an input tensor or the result of an earlier node."""

    index: int


@dataclass(frozen=True)
class Weight:
    """Reference to the tensor called ``name``."""

    name: str


Literal_ = None | bool | int | float | str
Arg = Value | Weight | Literal_ | tuple["Arg", ...]


@dataclass(frozen=True)
class Branch:
    """One container of a call or result tree; ``keys`` are a dict's keys or a named tuple's fields."""

    kind: Kind
    children: tuple[Tree, ...]
    keys: tuple[str | int, ...] = ()


Tree = Value | Weight | Literal_ | Branch


@dataclass(frozen=True)
class Input:
    """One input tensor: ``shape`` has None where the batch stands; ``dtype`` as ``"float32"``."""

    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and role of one named tensor; a ``frozen`` one is a parameter that takes no gradient."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    role: Role = "parameter"


@dataclass(frozen=True)
class Node:
    """One operator call: ``args`` by argument name, defaults left out; ``path`` is the module it came from.

    ``overload``: torch's own operator where the table has none (a *foreign* node, ``trace(..., foreign=True)``). No
    file holds one; its literals may be anything torch takes.
    """

    op: str
    args: Mapping[str, Arg]
    path: str = field(default="", compare=False)
    overload: Any = None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A network as data.

    ``call`` is ``Branch(tuple, (positional, keywords))``; ``names`` are the positional arguments' names.
    ``tensors`` holds every state-dict tensor once plus ``_constant.N``; ``aliases`` maps the further names
    of tied tensors to the first one. ``constants`` (values of ``_constant.N``) exist at trace time only.
    """

    inputs: tuple[Input, ...]
    call: Branch
    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: Tree
    tensors: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dynamic(self) -> bool:
        """Whether any input has a free batch dimension."""
        return any(None in item.shape for item in self.inputs)

    @property
    def foreign(self) -> tuple[Node, ...]:
        """Nodes whose operator is not in the table: this graph can be analysed and run here, not stored."""
        return tuple(node for node in self.nodes if node.overload is not None)

    def used(self) -> set[str]:
        """Names of the tensors that some node or the output refers to."""
        found = {arg.name for node in self.nodes for arg in references(node) if isinstance(arg, Weight)}
        return found | {leaf.name for leaf in leaves(self.output) if isinstance(leaf, Weight)}

    def without_statistics(self, names: Set[str]) -> Graph:
        """The graph with each affine batch norm whose statistics are among ``names`` as a scale and a shift.

        Exact once the caller rewrote weight and bias so that mean = 0 and variance = 1 - eps. The statistics are
        dropped; batch norms without weight and bias, or that use batch statistics, stay.
        """
        chosen = [node for node in self.nodes if _normalises(node) and set(_statistics(node)) <= names]
        nodes = tuple(_scale_shift(node) if node in chosen else node for node in self.nodes)
        kept = replace(self, nodes=nodes).used()
        dropped = {name for node in chosen for name in _statistics(node) if name not in kept}
        aliases = {alias: name for alias, name in self.aliases.items() if name not in dropped}
        tensors = {name: spec for name, spec in self.tensors.items() if name not in dropped}
        return replace(self, nodes=nodes, tensors=tensors, aliases=aliases)


def _normalises(node: Node) -> bool:
    return node.op == "batch_norm" and all(
        isinstance(node.args.get(name), Weight) for name in ("weight", "bias", "running_mean", "running_var")
    )


def _scale_shift(node: Node) -> Node:
    return Node("scale_shift", {name: node.args[name] for name in ("input", "weight", "bias")}, node.path)


def _statistics(node: Node) -> Iterator[str]:
    for key in ("running_mean", "running_var"):
        arg = node.args[key]
        if isinstance(arg, Weight):
            yield arg.name
            yield arg.name.removesuffix(key) + "num_batches_tracked"


def references(node: Node) -> Iterator[Value | Weight]:
    """Every value and tensor a node refers to, in argument order."""
    stack: list[Arg] = list(reversed(list(node.args.values())))
    while stack:
        arg = stack.pop()
        if isinstance(arg, Value | Weight):
            yield arg
        elif isinstance(arg, tuple):
            stack.extend(reversed(arg))


def leaves(tree: Tree) -> Iterator[Value | Weight | Literal_]:
    """Leaves of a call or result tree from left to right."""
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, Branch):
            stack.extend(reversed(item.children))
        else:
            yield item


def usual_role(name: str, dtype: str) -> Role:
    """The role a tensor of this name and dtype nearly always has; files store only the exceptions."""
    if name.startswith(CONSTANT_PREFIX):
        return "constant"
    floating = dtype.startswith(("float", "bfloat"))
    return "parameter" if floating and name.rpartition(".")[2] not in _BUFFER_NAMES else "buffer"
