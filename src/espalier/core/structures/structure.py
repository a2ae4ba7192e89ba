"""What a structure is: a weight of a fixed shape made from named arrays of numbers by a rule with a few whole options.

``dense`` works on NumPy arrays and on torch tensors and does the same floating-point operations in the same order on
both, so that a decoded weight equals the trained one bit for bit: gathers, products of two numbers, and sums written
out term by term; no matrix product, whose order of summation belongs to the library.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt

Numbers = Any
"""A NumPy array or a torch tensor: whatever indexes, multiplies and adds."""

LARGEST = 2**40
"""What an option may be at most."""


@dataclass(frozen=True)
class Structure(ABC):
    """The rule of one weight. Fields besides ``shape`` are its options: whole numbers, or tuples of these.

    ``shape``: of the weight. ``kind`` names it in files. A structure checks its options in ``__post_init__`` by
    raising ``ValueError``: files from strangers come by here.
    """

    kind: ClassVar[str]
    shape: tuple[int, ...]

    @abstractmethod
    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the arrays the weight is made from."""

    @abstractmethod
    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        """The weight, of ``shape``, from arrays of :meth:`part_shapes`; exact, see the head of this file."""

    def fast(self, parts: Mapping[str, Numbers]) -> Numbers:
        """The same up to rounding, for training with torch; by default :meth:`dense`."""
        return self.dense(parts)

    @property
    def count(self) -> int:
        """How many numbers the weight is made from."""
        return sum(math.prod(shape) for shape in self.part_shapes().values())

    def split(self, flat: Numbers) -> dict[str, Numbers]:
        """The parts in a flat array of :attr:`count` numbers, as views."""
        found, start = {}, 0
        for name, shape in self.part_shapes().items():
            size = math.prod(shape)
            found[name] = flat[start : start + size].reshape(shape)
            start += size
        return found

    def options(self) -> dict[str, Any]:
        """The options as JSON data."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "shape"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


STRUCTURES: dict[str, type[Structure]] = {}
"""Every structure that a file may name, by kind."""


def register_structure(cls: type[Structure]) -> type[Structure]:
    """Let files hold a further kind of structure."""
    STRUCTURES[cls.kind] = cls
    return cls


def structure_of(kind: Any, shape: tuple[int, ...], options: Any) -> Structure:
    """A structure from untrusted data; raises ``Corrupt`` for anything that is none."""
    cls = STRUCTURES.get(kind) if isinstance(kind, str) else None
    if cls is None or not isinstance(options, Mapping):
        raise Corrupt(f"a weight has the structure {str(kind)[:80]!r}; known: {', '.join(sorted(STRUCTURES))}")
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in ("shape", "kind")}
    if set(options) != set(hints):
        raise Corrupt(f"a {kind} weight has the options {sorted(map(str, options))}; due: {sorted(hints)}")
    given = {}
    for name, value in options.items():
        many = hints[name] is not int
        if not all(_whole(item) for item in value) if many and isinstance(value, list) else many or not _whole(value):
            raise Corrupt(f"a {kind} weight has {name}={str(value)[:80]}; whole numbers from 0 are due")
        given[name] = tuple(value) if many else value
    try:
        return cls(shape=shape, **given)
    except ValueError as error:
        raise Corrupt(f"a {kind} weight of shape {shape} does not fit together: {error}") from error


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def gather(values: Numbers, index: NDArray[Any]) -> Numbers:
    """``values[index]`` for a one-dimensional ``values``; differentiable where it is a tensor."""
    if isinstance(values, np.ndarray):
        return values[index]
    import torch

    flat = torch.from_numpy(np.require(index.reshape(-1), requirements=["C", "W"])).to(values.device)
    return values.index_select(0, flat).reshape(index.shape)
