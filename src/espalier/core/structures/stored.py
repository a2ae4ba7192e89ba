"""A structured weight as a file stores it: the rule, and each array of numbers in a representation of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from espalier.core.errors import Corrupt, UsageError
from espalier.core.representation import (
    DTYPES,
    KINDS,
    Array,
    Dense,
    Meta,
    Representation,
    float32_to_bfloat16,
    from_state,
)
from espalier.core.structures.structure import Structure, structure_of

INNER = ("dense", "affine", "codebook")
"""How the numbers themselves may be stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Structured(Representation):
    """``structure.dense(parts)``; the parts are stored, the weight is made of them when it is read."""

    kind: ClassVar[str] = "structured"
    structure: Structure
    parts: dict[str, Representation]

    def __post_init__(self) -> None:
        due, given = self.structure.part_shapes(), {name: part.shape for name, part in self.parts.items()}
        if due != given or self.structure.shape != self.shape:
            raise UsageError(f"a {self.structure.kind} weight of shape {self.shape} needs {due}; got {given}")

    def dense(self) -> Array:
        values = self.structure.dense({name: part.dense() for name, part in self.parts.items()})
        if self.dtype == "bfloat16":
            return (float32_to_bfloat16(values.astype(np.float32)).astype(np.uint32) << 16).view(np.float32)
        made: Array = values.astype(DTYPES[self.dtype], copy=False)
        return made

    def take(self, dim: int, index: Array) -> Dense:
        """The values that stay, without the structure, which a cut would break."""
        values = self.dense()
        bits = float32_to_bfloat16(values) if self.dtype == "bfloat16" else values
        return Dense(shape=self.shape, dtype=self.dtype, values=bits).take(dim, index)

    def bits(self) -> int:
        return sum(part.bits() for part in self.parts.values())

    def state(self) -> tuple[Meta, dict[str, Array]]:
        inner: Meta = {}
        arrays: dict[str, Array] = {}
        for place, part in self.parts.items():
            own, found = part.state()
            inner[place] = {"kind": part.kind, **own}
            arrays |= {f"{place}.{name}": array for name, array in found.items()}
        return {"structure": self.structure.kind, "options": self.structure.options(), "parts": inner}, arrays

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Structured:
        structure = structure_of(meta["structure"], shape, meta["options"])
        due, inner = structure.part_shapes(), dict(meta["parts"])
        if set(due) != set(inner):
            raise Corrupt(f"a {structure.kind} weight is made from {sorted(due)}; the file has {sorted(inner)}")
        made = {}
        for place, part_shape in due.items():
            own = dict(inner[place])
            kind = own.pop("kind")
            if kind not in INNER:
                raise Corrupt(f"a {str(kind)[:80]!r} inside a structured weight; allowed: {', '.join(INNER)}")
            arrays = {name.removeprefix(f"{place}."): a for name, a in parts.items() if name.startswith(f"{place}.")}
            made[place] = from_state(kind, part_shape, dtype, own, arrays)
        return cls(shape=shape, dtype=dtype, structure=structure, parts=made)


KINDS[Structured.kind] = Structured
