"""A hashed weight: every position takes one of few numbers, by a hash of the position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.structures.arrays import flipped, hashes, signs
from espalier.core.structures.structure import Numbers, Structure, gather


@dataclass(frozen=True)
class Hashed(Structure):
    """``W[p] = buckets[h(p)] * xi(p)`` for the flat position p; bucket h and sign xi are hashes of p and ``seed``."""

    kind: ClassVar[str] = "hashed"
    buckets: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.buckets <= math.prod(self.shape):
            raise ValueError(f"from 1 to {math.prod(self.shape)} buckets are due; got {self.buckets}")

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"buckets": (self.buckets,)}

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """The bucket of every position."""
        found = hashes(math.prod(self.shape), 2 * self.seed) % np.uint64(self.buckets)
        return found.astype(np.int64).reshape(self.shape)

    @cached_property
    def signs(self) -> NDArray[Any]:
        """The sign of every position."""
        return signs(math.prod(self.shape), 2 * self.seed + 1).reshape(self.shape)

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        return flipped(gather(parts["buckets"], self.index), self.signs)
