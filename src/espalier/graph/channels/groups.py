"""Channel groups: which indices of which tensors can only be removed together.

A *unit* is a smallest set of indices that can go; units that reach the same dimensions of the same tensors form a
*group* (the output channels of a layer with everything that reads them, the heads of an attention). Dimensions that are
reshaped offer a choice - whole heads, or the same places of every head; each choice is solved on its own, as any union
of both leaves rectangles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.graph.channels.atoms import Ids, Labels, Product, roots
from espalier.graph.channels.flow import Flow, follow
from espalier.graph.channels.rules.contraction import KERNEL
from espalier.graph.graph import Graph

Kind = Literal["channels", "heads", "width", "groups"]
"""``heads``: whole attention heads; ``width``: the same places of every head; ``groups``: whole convolution groups."""


@dataclass(frozen=True)
class Place:
    """One dimension of a tensor that a group reaches: at ``index``, owned by the units ``unit`` (same length)."""

    tensor: str
    dim: int
    index: Ids
    unit: Ids


@dataclass(frozen=True)
class Group:
    """``size`` units that can be removed one by one. ``places``: what goes with them. ``atoms``: for the solver."""

    name: str
    kind: Kind
    size: int
    places: tuple[Place, ...]
    signature: tuple[tuple[str, int, int], ...]
    family: int
    units: Ids

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors it reaches."""
        return list(dict.fromkeys(place.tensor for place in self.places))


@dataclass(frozen=True)
class Protected:
    """A dimension of a parameter that stays whole, or some of it, and the reason."""

    tensor: str
    dim: int
    count: int
    reason: str


@dataclass(frozen=True)
class _Family:
    """One way to resolve every reshaped dimension: the smallest atom of each set, and which sets stay."""

    root: Ids
    pinned: NDArray[np.bool_]
    reshaped: NDArray[np.bool_]
    grouped: NDArray[np.bool_]


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a graph. ``boundaries``: operators without a channel rule that channels met."""

    graph: Graph
    flow: Flow
    groups: tuple[Group, ...]
    protected: tuple[Protected, ...]
    boundaries: tuple[str, ...]
    families: tuple[_Family, ...]

    def removed_atoms(self, chosen: dict[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Whether each atom goes, given a mask over the units of some groups by name."""
        gone = np.zeros(self.flow.atoms.count, dtype=np.bool_)
        for number, family in enumerate(self.families):
            units = [g.units[chosen[g.name]] for g in self.groups if g.family == number and g.name in chosen]
            if any(len(some) for some in units):
                first = np.zeros(self.flow.atoms.count, dtype=np.bool_)
                first[np.concatenate(units)] = True
                gone |= first[family.root]
        gone[0] = False
        return gone


def channel_groups(graph: Graph) -> ChannelGroups:
    """Analyse ``graph``: what can be removed together, what is protected and why."""
    flow = follow(graph)
    families = _families(flow)
    places = [
        (name, dim, ids)
        for name, labels in flow.tensors.items()
        for dim, ids in enumerate(labels.ids)
        if ids is not None
    ]
    groups: list[Group] = []
    seen: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
    for number, family in enumerate(families):
        found, fingerprints = _groups(graph, family, number, places, seen)
        groups += found
        seen = np.concatenate([seen, fingerprints])
    named = _named(groups)
    return ChannelGroups(
        graph, flow, tuple(named), tuple(_protected(flow, families, places)), tuple(dict.fromkeys(flow.boundaries)),
        tuple(families),
    )  # fmt: skip


def _families(flow: Flow) -> list[_Family]:
    atoms = flow.atoms
    ties = list(atoms.ties)
    pinned_atoms = np.zeros(atoms.count, dtype=np.bool_)
    for ids, _ in atoms.pins:
        pinned_atoms[ids] = True
    open_ = list(atoms.products)
    while True:
        root, pinned = _closed(atoms.count, ties, pinned_atoms)
        left: list[Product] = []
        for product in open_:
            alive = [n for n, axis in enumerate(product.axes) if not pinned[root[axis]].all()]
            grid = product.grid
            if not alive or pinned[root[grid]].all():
                for ids in (grid.reshape(-1), *product.axes):
                    pinned_atoms[ids] = True
            elif len(alive) == 1:
                axis = product.axes[alive[0]]
                moved = np.moveaxis(grid, alive[0], 0).reshape(len(axis), -1)
                ties += [(axis, moved[:, n]) for n in range(moved.shape[1])]
            else:
                left.append(product)
        if len(left) == len(open_):
            break
        open_ = left
    kinds = _reached(atoms.count, ties, open_)
    choices = max((len(_alive(product, root, pinned)) for product in open_), default=1)
    found = []
    for back in range(1, choices + 1):
        extra, stay = list(ties), pinned_atoms.copy()
        taken = np.zeros(atoms.count, dtype=np.int8)
        for product in open_:
            alive = _alive(product, root, pinned)
            chosen = _choice([taken[root[product.axes[n]]] for n in alive], back)
            axis = product.axes[alive[chosen]]
            moved = np.moveaxis(product.grid, alive[chosen], 0).reshape(len(axis), -1)
            extra += [(np.repeat(axis, moved.shape[1]), moved.reshape(-1))]
            taken[root[axis]] = TAKEN
            for number, other in enumerate(product.axes):
                if number != alive[chosen]:
                    stay[other] = True
                    taken[root[other]] = LEFT
        found.append(_Family(*_closed(atoms.count, extra, stay), *kinds))
    return found


TAKEN, LEFT = 1, 2


def _choice(states: list[NDArray[np.int8]], back: int) -> int:
    """Which axis of a product this family cuts: one that it cuts elsewhere, else the ``back``-th from the end.

    Axes that it leaves whole elsewhere come last: the heads of query, key and value are one axis in several products.
    """
    for number, state in enumerate(states):
        if (state == TAKEN).any():
            return number
    free = [number for number, state in enumerate(states) if not (state == LEFT).any()] or list(range(len(states)))
    return free[max(0, len(free) - back)]


def _alive(product: Product, root: Ids, pinned: NDArray[np.bool_]) -> list[int]:
    return [n for n, axis in enumerate(product.axes) if not pinned[root[axis]].all()]


def _closed(count: int, ties: list[tuple[Ids, Ids]], stay: NDArray[np.bool_]) -> tuple[Ids, NDArray[np.bool_]]:
    """Root of every atom, and for every atom whether something tied to it stays."""
    root = roots(count, ties)
    pinned = np.zeros(count, dtype=np.bool_)
    pinned[root[stay]] = True
    return root, pinned[root]


def _reached(
    count: int, ties: list[tuple[Ids, Ids]], products: list[Product]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Atoms tied to a reshaped dimension, and to a dimension laid out in convolution or norm groups."""
    root = roots(count, ties)
    found = []
    for origin in ("reshape", "groups"):
        reached = np.zeros(count, dtype=np.bool_)
        for product in products:
            if product.origin == origin:
                for ids in (product.grid.reshape(-1), *product.axes):
                    reached[root[ids]] = True
        found.append(reached[root])
    return found[0], found[1]


def _groups(
    graph: Graph, family: _Family, number: int, places: list[tuple[str, int, Ids]], seen: NDArray[np.uint64]
) -> tuple[list[Group], NDArray[np.uint64]]:
    """Groups of one family whose units are not among ``seen`` (fingerprints of the indices they take)."""
    ids = [place[2] for place in places]
    if not ids:
        return [], seen[:0]
    flat = np.concatenate(ids)
    place = np.repeat(np.arange(len(places)), [len(x) for x in ids])
    position = np.concatenate([np.arange(len(x)) for x in ids])
    root = family.root[flat]
    free = ~family.pinned[flat] & (flat != 0)
    root, place, position = root[free], place[free], position[free]
    if not root.size:
        return [], seen[:0]
    unit_roots, unit = np.unique(root, return_inverse=True)
    rng = np.random.default_rng(0)
    prints = np.zeros(len(unit_roots), dtype=np.uint64)
    salt = rng.integers(1, 2**63, size=len(places), dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(prints, unit, _mixed(salt[place], position.astype(np.uint64)))
        shapes = np.zeros(len(unit_roots), dtype=np.uint64)
        np.add.at(shapes, unit, salt[place])
    parameters = np.array([graph.tensors[name].role in ("parameter", "frozen") for name, _, _ in places])
    useful = np.zeros(len(unit_roots), dtype=np.bool_)
    useful[unit[parameters[place]]] = True
    useful &= ~np.isin(prints, seen)
    _, kind = np.unique(shapes, return_inverse=True)
    groups = []
    for label in np.unique(kind[useful]):
        members = np.flatnonzero((kind == label) & useful)
        if len(members) < 2:
            continue
        local = np.full(len(unit_roots), -1, dtype=np.int64)
        local[members] = np.arange(len(members))
        mine = np.flatnonzero(local[unit] >= 0)
        found = []
        for n in np.unique(place[mine]):
            at = mine[place[mine] == n]
            order = np.argsort(position[at], kind="stable")
            found.append(Place(places[n][0], places[n][1], position[at][order], local[unit[at][order]]))
        first = unit_roots[members]
        groups.append(
            Group(
                name="", kind=_kind(family, first, number), size=len(members), places=tuple(found),
                signature=_signature(found, len(members)), family=number, units=first,
            )
        )  # fmt: skip
    groups.sort(key=lambda group: min(_order(places, place) for place in group.places))
    return groups, prints[useful]


def _order(places: list[tuple[str, int, Ids]], place: Place) -> int:
    return next(n for n, (name, dim, _) in enumerate(places) if (name, dim) == (place.tensor, place.dim))


def _mixed(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of pairs (splitmix64)."""
    z: NDArray[np.uint64] = a + (b + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _kind(family: _Family, members: Ids, number: int) -> Kind:
    if family.reshaped[members].any():
        return "width" if number == 0 else "heads"
    if family.grouped[members].any() and number > 0:
        return "groups"
    return "channels"


def _signature(places: list[Place], size: int) -> tuple[tuple[str, int, int], ...]:
    """What makes two groups isomorphic: the layers they reach by last name and dimension, and how often per unit."""
    return tuple(sorted((p.tensor.rpartition(".")[2], p.dim, len(p.index) // size) for p in places))


def _named(groups: list[Group]) -> list[Group]:
    """Named after the first tensor each group's units come out of: ``layer1.0.conv1``, ``blocks.0.attn.qkv:heads``."""
    from dataclasses import replace

    used: dict[str, int] = {}
    named = []
    for group in groups:
        sources = [p for p in group.places if p.dim == 0] or list(group.places)
        first = sources[0].tensor.rpartition(".")[0] or sources[0].tensor
        name = first if group.kind == "channels" else f"{first}:{group.kind}"
        used[name] = used.get(name, 0) + 1
        named.append(replace(group, name=name if used[name] == 1 else f"{name}#{used[name]}"))
    return named


def _protected(flow: Flow, families: list[_Family], places: list[tuple[str, int, Ids]]) -> list[Protected]:
    """Dimensions of parameters of which something stays in every family, with the first reason that reaches them."""
    root = families[0].root
    reason: dict[int, str] = {}
    for ids, why in flow.atoms.pins:
        for at in np.unique(root[ids]):
            reason.setdefault(int(at), why)
    found = []
    for name, dim, ids in places:
        if flow.graph.tensors[name].role not in ("parameter", "frozen"):
            continue
        if all(reason.get(int(at)) == KERNEL for at in root[ids]):
            continue
        stay = np.ones(len(ids), dtype=np.bool_)
        for family in families:
            stay &= family.pinned[ids]
        if stay.any():
            whys = [reason[int(at)] for at in np.unique(root[ids[stay]]) if int(at) in reason]
            found.append(Protected(name, dim, int(stay.sum()), whys[0] if whys else "it cannot be cut evenly"))
    return found


def kept_sizes(labels: Labels, gone: NDArray[np.bool_]) -> tuple[int, ...]:
    """The shape of a tensor after the atoms ``gone`` were taken out."""
    return tuple(
        size if ids is None else int((~gone[ids]).sum()) for size, ids in zip(labels.shape, labels.ids, strict=True)
    )


def kept_index(ids: Any, gone: NDArray[np.bool_]) -> Ids | None:
    """Positions that stay, or None if all do."""
    if ids is None or not gone[ids].any():
        return None
    return np.flatnonzero(~gone[ids])
