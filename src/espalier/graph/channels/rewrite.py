"""The graph without some channels: sizes that were baked into arguments follow what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.graph.channels.atoms import Ids, Labels
from espalier.graph.channels.flow import Flow
from espalier.graph.channels.groups import kept_index, kept_sizes
from espalier.graph.graph import Arg, Graph, Node

Gone = NDArray[np.bool_]


@dataclass(frozen=True)
class _Site:
    """One node with the labels of its arguments and results, and what goes."""

    node: Node
    args: Mapping[str, Any]
    out: Any
    gone: Gone

    def sizes(self, labels: Labels) -> tuple[int, ...]:
        return kept_sizes(labels, self.gone)

    def kept(self, ids: Ids | None, start: int, end: int) -> int:
        return end - start if ids is None else int((~self.gone[ids[start:end]]).sum())

    def literals(self, name: str, sizes: tuple[int, ...]) -> dict[str, Arg]:
        """Argument ``name``, a list of sizes, brought to ``sizes``; -1 and computed sizes stay."""
        given = self.node.args[name]
        assert isinstance(given, tuple)  # noqa: S101 - the table says so
        return {
            name: tuple(new if type(old) is int and old >= 0 else old for old, new in zip(given, sizes, strict=True))
        }


_Change = Callable[[_Site], "dict[str, Arg] | Node"]


def _shape(name: str) -> _Change:
    return lambda site: site.literals(name, site.sizes(site.out))


def _unflatten(site: _Site) -> dict[str, Arg]:
    x: Labels = site.args["self"]
    dim = site.args["dim"] % len(x.shape)
    return site.literals("sizes", site.sizes(site.out)[dim : dim + len(site.args["sizes"])])


def _pieces(site: _Site) -> dict[str, Arg] | Node:
    dim = site.args["dim"] % len(site.args["self"].shape)
    sizes = tuple(site.sizes(item)[dim] for item in site.out)
    if site.node.op == "split_with_sizes":
        return site.literals("split_sizes", sizes)
    if len(set(sizes)) == 1:
        return {"split_size": sizes[0]} if site.node.op == "split" else {}
    kept = {name: arg for name, arg in site.node.args.items() if name in ("self", "dim")}
    return Node("split_with_sizes", {"self": kept.pop("self"), "split_sizes": sizes, **kept}, site.node.path)


def _slice(site: _Site) -> dict[str, Arg]:
    x: Labels = site.args["self"]
    dim = site.args["dim"] % len(x.shape)
    ids, size = x.ids[dim], x.shape[dim]
    if ids is None or site.args["step"] != 1:
        return {}
    start, end, _ = slice(site.args["start"], site.args["end"]).indices(size)
    before = site.kept(ids, 0, start)
    return {"start": before, "end": before + site.kept(ids, start, end)}


def _narrow(site: _Site) -> dict[str, Arg]:
    x: Labels = site.args["self"]
    ids = x.ids[site.args["dim"] % len(x.shape)]
    start, length = site.args["start"], site.args["length"]
    return {} if ids is None else {"start": site.kept(ids, 0, start), "length": site.kept(ids, start, start + length)}


def _pad(site: _Site) -> dict[str, Arg]:
    x: Labels = site.args["input"]
    pads = list(site.args["pad"])
    for number in range(len(pads) // 2):
        dim = len(x.shape) - 1 - number
        ids = site.out.ids[dim]
        if ids is not None:
            before, after = pads[2 * number : 2 * number + 2]
            pads[2 * number] = site.kept(ids, 0, before)
            pads[2 * number + 1] = site.kept(ids, len(ids) - after, len(ids))
    return {"pad": tuple(pads)}


def _normalised(site: _Site) -> dict[str, Arg]:
    count = len(site.args["normalized_shape"])
    return {"normalized_shape": site.sizes(site.args["input"])[-count:]}


def _rows(site: _Site, ids: Ids | None, groups: int) -> int:
    """How many of the groups that ``ids`` is laid out in still have a channel."""
    return groups if ids is None else int((~site.gone[ids]).reshape(groups, -1).any(1).sum())


def _group_norm(site: _Site) -> dict[str, Arg]:
    return {"num_groups": _rows(site, site.args["input"].ids[1], site.args["num_groups"])}


def _shuffle(site: _Site) -> dict[str, Arg]:
    return {"groups": _rows(site, site.args["self"].ids[1], site.args["groups"])}


def _convolution(rank: int) -> _Change:
    def change(site: _Site) -> dict[str, Arg]:
        x: Labels = site.args["input"]
        groups = site.args["groups"]
        return {"groups": _rows(site, x.ids[len(x.shape) - rank - 1], groups)} if groups > 1 else {}

    return change


def _attention(site: _Site) -> dict[str, Arg]:
    query: Labels = site.args["query"]
    if site.args["scale"] is None and kept_index(query.ids[-1], site.gone) is not None:
        return {"scale": 1 / math.sqrt(query.shape[-1])}
    return {}


CHANGES: dict[str, _Change] = {
    "reshape": _shape("shape"),
    "expand": _shape("size"),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _shape("size")),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
    "slice": _slice,
    "slice_scatter": _slice,
    "narrow": _narrow,
    "pad": _pad,
    "layer_norm": _normalised,
    "rms_norm": _normalised,
    "group_norm": _group_norm,
    "channel_shuffle": _shuffle,
    **{f"conv{rank}d": _convolution(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _convolution(rank) for rank in (1, 2, 3)},
    "attention": _attention,
}
"""Operators whose arguments hold sizes that follow from channels."""


def rewritten_node(flow: Flow, number: int, gone: Gone) -> Node:
    """Node ``number`` with the arguments it needs once ``gone`` are out; itself where nothing changes."""
    node = flow.graph.nodes[number]
    change = CHANGES.get(node.op)
    if change is None:
        return node
    site = _Site(node, flow.arguments(node), flow.values[len(flow.graph.inputs) + number], gone)
    done = change(site)
    if isinstance(done, Node):
        return done
    args = {**node.args, **{name: value for name, value in done.items() if node.args.get(name) != value}}
    return node if args == node.args else replace(node, args=args)


def without(flow: Flow, gone: Gone) -> Graph:
    """The graph after the atoms ``gone`` were taken out of every tensor."""
    graph = flow.graph
    nodes = tuple(rewritten_node(flow, number, gone) for number in range(len(graph.nodes)))
    tensors = {
        name: replace(spec, shape=kept_sizes(flow.tensors[name], gone)) if name in flow.tensors else spec
        for name, spec in graph.tensors.items()
    }
    constants = {name: taken(flow, name, tensor, gone) for name, tensor in graph.constants.items()}
    return replace(graph, nodes=nodes, tensors=tensors, constants=constants)


def indices(flow: Flow, gone: Gone) -> dict[str, dict[int, Ids]]:
    """Tensor -> dimension -> positions kept; dimensions that stay whole are left out."""
    found: dict[str, dict[int, Ids]] = {}
    for name, labels in flow.tensors.items():
        for dim, ids in enumerate(labels.ids):
            index = kept_index(ids, gone)
            if index is not None:
                found.setdefault(name, {})[dim] = index
    return found


def taken(flow: Flow, name: str, tensor: Any, gone: Gone) -> Any:
    """What is left of one tensor."""
    import torch

    labels = flow.tensors.get(name)
    if labels is None:
        return tensor
    for dim, ids in enumerate(labels.ids):
        index = kept_index(ids, gone)
        if index is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return tensor
