"""A weight of circulant blocks, kept as the first column of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.structures.arrays import flipped, pick, signs
from espalier.core.structures.structure import Numbers, Structure


@dataclass(frozen=True)
class Circulant(Structure):
    """``W[i, j] = c[(i - j) mod block] * d[j]`` in every block of the first two dimensions, at every kernel position.

    ``columns``: (blocks down, blocks across, positions, block). Blocks at the lower and right edge are cut off.
    ``flips``: 1 where the signs d, one for each input, come from ``seed``; 0 where they are all +1.
    """

    kind: ClassVar[str] = "circulant"
    block: int
    flips: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or not 1 <= self.block <= max(self.shape[:2]) or self.flips not in (0, 1):
            raise ValueError(
                f"two dimensions, a block from 1 to the larger of the first two and flips of 0 or 1 are due; got "
                f"{self.shape}, block {self.block}, flips {self.flips}"
            )

    @property
    def positions(self) -> int:
        """Of the kernel; 1 for a matrix."""
        return math.prod(self.shape[2:])

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        down, across = (-(-size // self.block) for size in self.shape[:2])
        return {"columns": (down, across, self.positions, self.block)}

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Where in the flat columns each entry of (out, in, positions) lies."""
        out, into = (np.arange(size) for size in self.shape[:2])
        _, across, positions, block = self.part_shapes()["columns"]
        blocks = (out // block)[:, None] * across + (into // block)[None, :]
        place = (out[:, None] - into[None, :]) % block
        return (blocks[..., None] * positions + np.arange(positions)) * block + place[..., None]

    @cached_property
    def signs(self) -> NDArray[Any] | None:
        """The signs d as (in, 1); None where there are none."""
        return signs(self.shape[1], self.seed)[:, None] if self.flips else None

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        made = pick(parts["columns"].reshape(-1), self.index)
        return (made if self.signs is None else flipped(made, self.signs)).reshape(self.shape)
