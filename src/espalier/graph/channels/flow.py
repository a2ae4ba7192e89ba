"""How channel identities flow through a graph: one walk, one rule per operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from espalier.graph.channels.atoms import Atoms, Ids, Labels
from espalier.graph.check import infer, with_defaults
from espalier.graph.graph import Arg, Graph, Node, Value, Weight, leaves, references
from espalier.graph.operators import operator_of
from espalier.graph.operators.foreign import shown

EXAMPLE_BATCH = 3
"""Batch size of the analysis: no power of two, so that it is not mistaken for a number of channels."""


@dataclass
class Flow:
    """The labels of every value and tensor of ``graph``, and the atoms they are made of.

    ``boundaries``: operators without a rule that channels met; what reaches them stays whole. ``given``: the values
    that are the model's input, or made of it without parameters. ``here``: the operator at work;
    ``met``: the reason of channels that meet what it fixes.
    """

    graph: Graph
    metas: list[Any]
    atoms: Atoms = field(default_factory=Atoms)
    values: list[Any] = field(default_factory=list)
    tensors: dict[str, Labels] = field(default_factory=dict)
    boundaries: list[str] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    here: str = ""
    met: str = ""

    def tensor(self, name: str) -> Labels:
        """Labels of a parameter or buffer, new where it is met for the first time."""
        if name not in self.tensors:
            shape = self.graph.tensors[name].shape
            self.tensors[name] = Labels(shape, tuple(self.atoms.fresh(n) for n in shape))
        return self.tensors[name]

    def look_up(self, arg: Arg) -> Any:
        """Labels in the place of references; literals as they are."""
        if isinstance(arg, Value):
            return self.values[arg.index]
        if isinstance(arg, Weight):
            return self.tensor(arg.name)
        return tuple(self.look_up(item) for item in arg) if isinstance(arg, tuple) else arg

    def arguments(self, node: Node) -> dict[str, Any]:
        """All arguments of a node by name, defaults filled in."""
        operator = operator_of(node)
        return with_defaults(operator, {name: self.look_up(arg) for name, arg in node.args.items()})

    # --- what rules say --------------------------------------------------------------------------

    def tie(self, a: Ids | None, b: Ids | None) -> None:
        """Atoms at the same position go together."""
        self.atoms.tie(a, b, self.met)

    def pin(self, ids: Ids | None, reason: str = "") -> None:
        """These atoms stay."""
        self.atoms.pin(ids, reason or f"{self.here} takes it apart by position")

    def pin_all(self, things: Any, reason: str = "") -> None:
        """All atoms in ``things`` stay."""
        for labels in all_labels(things):
            for ids in labels.ids:
                self.pin(ids, reason)

    def broadcast(self, operands: Sequence[Labels], shape: Sequence[Any]) -> Labels:
        """Element by element: dimensions of the same extent are one."""
        sizes = tuple(int(n) for n in shape)
        found: list[Ids | None] = []
        for back in range(len(sizes), 0, -1):
            size = sizes[-back]
            met = [x.ids[-back] for x in operands if len(x.shape) >= back and x.shape[-back] == size]
            first = next((ids for ids in met if ids is not None), None)
            if size <= 1 or first is None:
                found.append(None)
                continue
            for other in met:
                self.tie(first, other)
            found.append(None if any(ids is None for ids in met) else first)
        return Labels(sizes, tuple(found))

    def reshape(self, x: Labels, shape: Sequence[Any]) -> Labels:
        """The same elements in C order in other dimensions."""
        sizes = tuple(int(n) for n in shape)
        found: list[Ids | None] = [None] * len(sizes)
        for olds, news in _segments(x.shape, sizes):
            if len(olds) == 1 and len(news) == 1:
                found[news[0]] = x.ids[olds[0]]
                continue
            flat = self.atoms.merge([x.shape[n] for n in olds], [x.ids[n] for n in olds])
            for number, ids in zip(news, self.atoms.split(flat, [sizes[n] for n in news]), strict=True):
                found[number] = ids
        return Labels(sizes, tuple(found))


def all_labels(thing: Any) -> Iterator[Labels]:
    """Every tensor among arguments or results."""
    if isinstance(thing, Labels):
        yield thing
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from all_labels(item)
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from all_labels(item)


def _segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of ``old`` and ``new`` that hold the same elements; sizes of 1 are left out."""
    olds = [(n, size) for n, size in enumerate(old) if size != 1]
    news = [(n, size) for n, size in enumerate(new) if size != 1]
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        a, b = left[0][1], right[0][1]
        while a != b:
            if a < b:
                left.append(olds.pop(0))
                a *= left[-1][1]
            else:
                right.append(news.pop(0))
                b *= right[-1][1]
        yield [n for n, _ in left], [n for n, _ in right]


def follow(graph: Graph) -> Flow:
    """Walk ``graph`` once. Channels that decide the output's shape are pinned."""
    from espalier.graph.channels.rules import RULES

    metas = infer(graph, batch=EXAMPLE_BATCH)
    flow = Flow(graph, metas)
    for number, _ in enumerate(graph.inputs):
        flow.values.append(Labels.fixed(metas[number].shape))
        flow.given.add(number)
    for number, node in enumerate(graph.nodes, len(graph.inputs)):
        flow.here = shown(node.op, node.path)
        flow.met = f"it meets something at {flow.here} that may not shrink"
        read = [flow.values[arg.index] for arg in references(node) if isinstance(arg, Value)]
        mine = [arg.index in flow.given for arg in references(node) if isinstance(arg, Value)]
        if any(mine) and all(given or not _fixed(x) for given, x in zip(mine, read, strict=True)):
            flow.met = f"it meets the model's input at {flow.here}"
        flow.values.append(_apply(flow, RULES.get(node.op), node, metas[number]))
        if mine and all(mine) and not _parameters(graph, node) and _fixed(flow.values[-1]):
            flow.given.add(number)
    for leaf in leaves(graph.output):
        if isinstance(leaf, Value | Weight):
            flow.pin_all(flow.look_up(leaf), "it decides the shape of the output")
    return flow


def _fixed(thing: Any) -> bool:
    """Whether nothing can be taken from any of it."""
    return all(ids is None for labels in all_labels(thing) for ids in labels.ids)


def _parameters(graph: Graph, node: Node) -> bool:
    names = [arg.name for arg in references(node) if isinstance(arg, Weight)]
    return any(graph.tensors[name].role in ("parameter", "frozen") for name in names)


def _apply(flow: Flow, rule: Any, node: Node, out: Any) -> Any:
    if type(out) is int:
        return out
    arguments = flow.arguments(node)
    if rule is None:
        met = [ids for labels in all_labels(arguments) for ids in labels.ids if ids is not None]
        if met:
            flow.boundaries.append(flow.here)
        flow.pin_all(arguments, f"{flow.here} has no channel rule")
        return blank(out)
    return rule(flow, arguments, out)


def blank(out: Any) -> Any:
    """Fixed labels for a result."""
    if isinstance(out, Tensor):
        return Labels.fixed(out.shape)
    return tuple(blank(item) for item in out) if isinstance(out, tuple) else out
