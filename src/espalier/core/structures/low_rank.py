"""A weight as the product of two thin matrices, kept as these two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.structures.arrays import wide
from espalier.core.structures.structure import Numbers, Structure


@dataclass(frozen=True)
class LowRank(Structure):
    """``left @ right``: (m, rank) and (rank, n), where m is the first dimension and n all others together."""

    kind: ClassVar[str] = "low-rank"
    rank: int

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or self.rank < 1:
            raise ValueError(f"two dimensions and a rank of 1 at least are due; got {self.shape}, rank {self.rank}")

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"left": (self.shape[0], self.rank), "right": (self.rank, math.prod(self.shape[1:]))}

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        left, right = wide(parts["left"]), wide(parts["right"])
        total = left[:, :1] * right[:1]
        for k in range(1, self.rank):
            total = total + left[:, k : k + 1] * right[k : k + 1]
        return total.reshape(self.shape)

    def fast(self, parts: Mapping[str, Numbers]) -> Numbers:
        return (parts["left"] @ parts["right"]).reshape(self.shape)
