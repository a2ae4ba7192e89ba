"""Where the bytes are: the file's length split into what it is spent on, and per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units

KINDS = ("values", "positions", "codebooks", "floats", "graph", "plans", "header")
"""What bytes are spent on, in the order in which they are shown; ``header`` includes the file's fixed prefix."""

Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Share:
    """The bytes of one tensor (or of the tensors that are not shown singly) by kind, largest tensors first."""

    name: str
    shape: str
    coding: str
    parts: Parts
    total: int
    several: bool = False


@dataclass(frozen=True)
class Budget:
    """``total`` = length of the file; ``parts`` cover it but for ``unexplained`` bytes (negative: they exceed it)."""

    total: int
    parts: Parts
    shares: tuple[Share, ...]
    unexplained: int


@dataclass(frozen=True)
class Layer:
    """One tensor of the compressed model; a number is None where it was not recorded."""

    name: str
    shape: str
    parameters: int | None
    nonzero: int | None
    bits: float | None
    bytes: int | None
    coding: str = ""

    @property
    def density(self) -> float | None:
        """Fraction of the parameters that is not zero, 0..1."""
        return self.nonzero / self.parameters if self.parameters and self.nonzero is not None else None

    @property
    def bits_per_weight(self) -> float | None:
        """File bits per parameter, zeros included."""
        return 8 * self.bytes / self.parameters if self.parameters and self.bytes is not None else None


def whole(value: Any) -> int | None:
    """A non-negative integer of the record, else None."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and float(found).is_integer() else None


def objects(value: Any) -> Iterable[Mapping[str, Any]]:
    """The JSON objects in a JSON array; anything else is passed over."""
    return (item for item in value if isinstance(item, Mapping)) if isinstance(value, (list, tuple)) else ()


def shape_text(shape: Any) -> str:
    """``300 × 784``; ``scalar`` for an empty shape."""
    if not isinstance(shape, (list, tuple)):
        return ""
    return " × ".join(units.printable(size, 20) for size in shape[:8]) or "scalar"


def elements(shape: Any) -> int | None:
    """The number of elements of a tensor of this shape."""
    sizes = [whole(size) for size in shape] if isinstance(shape, (list, tuple)) else [None]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def budget(info: Any) -> Budget | None:
    """The budget of a file's ``info``; None where it names no bytes."""
    shares = [_share(tensor) for tensor in objects(at(info, "tensors"))]
    sums: dict[str, int] = {}
    for share in shares:
        for kind, size in share.parts:
            sums[kind] = sums.get(kind, 0) + size
    for kind, keys in (("graph", ("graph",)), ("plans", ("plans",)), ("header", ("prefix", "header"))):
        sums[kind] = sums.get(kind, 0) + sum(whole(at(info, key)) or 0 for key in keys)
    parts = _ordered(sums)
    explained = sum(size for _, size in parts)
    given = whole(at(info, "total"))
    total = explained if given is None else given
    if not total:
        return None
    ranked = tuple(sorted((s for s in shares if s.total), key=lambda share: -share.total))
    return Budget(total, parts, ranked, total - explained)


def _share(tensor: Mapping[str, Any]) -> Share:
    sizes = tensor.get("bytes")
    pairs = sizes.items() if isinstance(sizes, Mapping) else ()
    given = {units.printable(kind, 30): size for kind, value in pairs if (size := whole(value))}
    parts = _ordered(given)
    return Share(
        units.printable(tensor.get("name", "")),
        shape_text(tensor.get("shape")),
        _coding(tensor),
        parts,
        sum(n for _, n in parts),
    )


def _coding(tensor: Mapping[str, Any]) -> str:
    words = (tensor.get(key) for key in ("kind", "coder"))
    return ", ".join(units.printable(word, 60) for word in words if isinstance(word, str) and word)


def _ordered(sizes: Mapping[str, int]) -> Parts:
    order = {kind: place for place, kind in enumerate(KINDS)}
    names = sorted((kind for kind, size in sizes.items() if size), key=lambda kind: (order.get(kind, len(KINDS)), kind))
    return tuple((kind, sizes[kind]) for kind in names)


def largest(shares: Sequence[Share], limit: int) -> list[Share]:
    """The ``limit`` largest, the others summed into one more entry."""
    if len(shares) <= limit + 1:  # one left over is shown as itself
        return list(shares)
    rest = shares[limit:]
    sums: dict[str, int] = {}
    for share in rest:
        for kind, size in share.parts:
            sums[kind] = sums.get(kind, 0) + size
    name = f"{len(rest):,} smaller tensors"
    return [*shares[:limit], Share(name, "", "", _ordered(sums), sum(sums.values()), several=True)]


def layers(given: Any, info: Any) -> tuple[Layer, ...]:
    """The layers in the model's order, with the coding and, where missing, the bytes the file's info names."""
    shares = {share.name: share for share in map(_share, objects(at(info, "tensors")))}
    found = []
    for item in objects(given):
        name = units.printable(item.get("name", ""))
        share = shares.get(name)
        size = whole(item.get("bytes"))
        found.append(
            Layer(
                name,
                shape_text(item.get("shape")),
                elements(item.get("shape")) if (count := whole(item.get("parameters"))) is None else count,
                whole(item.get("nonzero")),
                number(item.get("bits")),
                share.total if size is None and share else size,
                share.coding if share else "",
            )
        )
    return tuple(found)
