"""A Monarch weight: two block-diagonal matrices with a permutation between them, kept as their blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from espalier.core.structures.arrays import contiguous, wide
from espalier.core.structures.structure import Numbers, Structure


@dataclass(frozen=True)
class Monarch(Structure):
    """``W[l * blocks + j, k * width + i] = sum_r left[k, j, l, r] * right[k, j, r, i]`` on (first dimension, others).

    ``left[:, j]`` is block j of L and ``right[k]`` block k of R in M = P L P^T R: R mixes the inputs of each of its
    blocks, the permutation deals the results out, one (``rank`` of them) to every block of L, and those mix them.
    So each slice (k, j) of the weight has rank ``rank``. Rows and columns beyond the weight are cut off.
    """

    kind: ClassVar[str] = "monarch"
    blocks: int
    rank: int

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or not 1 <= self.blocks <= min(self.matrix) or not 1 <= self.rank <= min(self.slice):
            raise ValueError(
                f"two dimensions, blocks from 1 to the smaller side and a rank from 1 to the smaller side of a slice "
                f"are due; got {self.shape}, {self.blocks} blocks, rank {self.rank}"
            )

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight as (rows, columns)."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def slice(self) -> tuple[int, int]:
        """Rows and columns of a slice (k, j)."""
        rows, columns = self.matrix
        return -(-rows // self.blocks), -(-columns // self.blocks)

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        height, width = self.slice
        ends = (self.blocks, self.blocks)
        return {"left": (*ends, height, self.rank), "right": (*ends, self.rank, width)}

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        left, right = wide(parts["left"]), wide(parts["right"])
        total = left[..., :1] * right[..., :1, :]
        for r in range(1, self.rank):
            total = total + left[..., r : r + 1] * right[..., r : r + 1, :]
        return self.joined(total)

    def fast(self, parts: Mapping[str, Numbers]) -> Numbers:
        return self.dense(parts) if self.rank == 1 else self.joined(parts["left"] @ parts["right"])

    def joined(self, slices: Numbers) -> Numbers:
        """(k, j, l, i) -> the weight."""
        height, width = self.slice
        rows, columns = self.matrix
        whole = slices.swapaxes(0, 2).reshape(height * self.blocks, self.blocks * width)
        return contiguous(whole[:rows, :columns]).reshape(self.shape)

    def cut(self, matrix: Numbers) -> Numbers:
        """(rows, columns), padded to full slices, -> (k, j, l, i)."""
        height, width = self.slice
        return matrix.reshape(height, self.blocks, self.blocks, width).swapaxes(0, 2)
