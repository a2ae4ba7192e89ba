"""Channel identities as integers, and what must go together, as arrays.

An *atom* is one index of one dimension of one tensor. Rules of operators *tie* atoms (they go together), *pin* them
(they stay), and relate a dimension to the axes it is reshaped into (a *product*). Everything is an array of atoms;
nothing is ever done index by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Atoms of one dimension, in order."""

Origin = Literal["reshape", "groups"]

FIXED = 0
"""The atom that stands where nothing may shrink; it is pinned from the start."""


@dataclass(frozen=True)
class Labels:
    """Shape of a tensor and the atoms of each dimension; None where nothing may shrink or the size is 1."""

    shape: tuple[int, ...]
    ids: tuple[Ids | None, ...]

    @classmethod
    def fixed(cls, shape: Sequence[Any]) -> Labels:
        """A tensor that nothing can be taken from."""
        return cls(tuple(int(n) for n in shape), (None,) * len(shape))

    def replaced(self, dim: int, ids: Ids | None) -> Labels:
        """The same with other atoms in dimension ``dim``."""
        dim %= len(self.shape)
        return Labels(self.shape, (*self.ids[:dim], ids, *self.ids[dim + 1 :]))


@dataclass(frozen=True)
class Product:
    """Atoms of ``grid`` stand at the crossings of ``axes``: whole slices across one axis can go, nothing else."""

    grid: Ids
    axes: tuple[Ids, ...]
    origin: Origin


class Atoms:
    """What the rules have said so far."""

    def __init__(self) -> None:
        self.count = 1
        self.ties: list[tuple[Ids, Ids]] = []
        self.pins: list[tuple[Ids, str]] = [(np.zeros(1, dtype=np.int64), "it may not shrink")]
        self.products: list[Product] = []

    def fresh(self, size: int) -> Ids | None:
        """New atoms for a dimension of ``size``; None for size 1 or less, from which nothing can be taken."""
        if size <= 1:
            return None
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def pin(self, ids: Ids | None, reason: str) -> None:
        """These atoms stay."""
        if ids is not None and ids.size:
            self.pins.append((np.unique(ids), reason))

    def tie(self, a: Ids | None, b: Ids | None, reason: str) -> None:
        """Atoms at the same position go together; against a dimension that may not shrink they stay."""
        if a is None or b is None:
            self.pin(a if b is None else b, reason)
        elif a is not b:
            self.ties.append((a.reshape(-1), b.reshape(-1)))

    def relate(self, grid: Ids, axes: Sequence[Ids | None], origin: Origin) -> None:
        """``grid`` (one array dimension per axis) lies at the crossings of ``axes``; axes of None may not shrink."""
        kept = tuple(axis for axis in axes if axis is not None)
        shape = tuple(len(axis) for axis in axes if axis is not None)
        if not kept:
            self.pin(grid.reshape(-1), "it is reshaped into dimensions that may not shrink")
        elif grid.ndim == len(kept):
            self.products.append(Product(grid, kept, origin))
        else:
            where = [number for number, axis in enumerate(axes) if axis is not None]
            moved = np.moveaxis(grid, where, range(len(where))).reshape(*shape, -1)
            for number in range(moved.shape[-1]):
                self.products.append(Product(moved[..., number], kept, origin))

    def merge(self, sizes: Sequence[int], ids: Sequence[Ids | None]) -> Ids | None:
        """Atoms of dimensions laid out one after the other in one dimension (C order)."""
        tracked = [number for number, item in enumerate(ids) if item is not None]
        if not tracked:
            return None
        spread = []
        for number in tracked:
            view = [1] * len(sizes)
            view[number] = sizes[number]
            spread.append(np.broadcast_to(np.asarray(ids[number]).reshape(view), tuple(sizes)).reshape(-1))
        if len(tracked) == 1:
            return spread[0]
        _, inverse = np.unique(np.stack(spread), axis=1, return_inverse=True)
        merged = self._numbered(inverse.reshape(-1))
        corner = tuple(slice(None) if number in tracked else 0 for number in range(len(sizes)))
        self.relate(merged.reshape(tuple(sizes))[corner], [ids[number] for number in tracked], "reshape")
        return merged

    def split(self, flat: Ids | None, sizes: Sequence[int], origin: Origin = "reshape") -> list[Ids | None]:
        """Atoms of each of the dimensions one dimension is laid out as."""
        axes: list[Ids | None] = [None] * len(sizes)
        if flat is None:
            return axes
        grid = flat.reshape(tuple(sizes))
        varying = [n for n, size in enumerate(sizes) if size > 1 and bool((grid != grid.take([0], axis=n)).any())]
        if not varying:
            self.pin(flat[:1], "one channel fills the whole dimension")
            return axes
        corner = grid[tuple(slice(None) if number in varying else 0 for number in range(len(sizes)))]
        if len(varying) == 1:
            axes[varying[0]] = corner
            return axes
        for position, number in enumerate(varying):
            rows = np.moveaxis(corner, position, 0).reshape(sizes[number], -1)
            _, inverse = np.unique(rows, axis=0, return_inverse=True)
            axes[number] = self._numbered(inverse.reshape(-1))
        self.relate(corner, [axes[number] for number in varying], origin)
        return axes

    def _numbered(self, inverse: Ids) -> Ids:
        """Fresh atoms, the same where ``inverse`` is the same."""
        first = self.count
        self.count += int(inverse.max()) + 1
        return (inverse + first).astype(np.int64)


def roots(count: int, ties: Sequence[tuple[Ids, Ids]]) -> Ids:
    """For every atom the smallest atom it is tied to, directly or not (hooking and pointer jumping)."""
    parent = np.arange(count, dtype=np.int64)
    if not ties:
        return parent
    a = np.concatenate([pair[0] for pair in ties])
    b = np.concatenate([pair[1] for pair in ties])
    while True:
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        open_ = low != high
        if not open_.any():
            return parent
        a, b = a[open_], b[open_]
        np.minimum.at(parent, high[open_], low[open_])
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
