"""A Toeplitz-like weight: few pairs of vectors whose products are its displacement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.structures.arrays import contiguous, double, narrow, pick, wide
from espalier.core.structures.structure import Numbers, Structure


@dataclass(frozen=True)
class Toeplitz(Structure):
    """``W - Z_1 W Z_{-1}^T = scale * sum_r g_r h_r^T`` in every square block of the matrix (first dimension, others).

    Z_f shifts down by one and puts f times the last entry on top. Walking back along a cyclic diagonal gives
    ``W[i, j] = (sum_{k <= j} e_k - sum_{k > j} e_k) / 2`` with ``e_k = scale * sum_r g_r[(i - j + k) mod n] h_r[k]``.

    ``g``, ``h``: (blocks, rank, n), where n is the smaller side of the matrix and blocks fill the larger one, of
    which the last is cut off. Sums run along each diagonal in float64, one after the other, in NumPy and in torch.
    """

    kind: ClassVar[str] = "toeplitz"
    rank: int

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or not 1 <= self.rank <= self.side:
            raise ValueError(
                f"two dimensions and a rank from 1 to the smaller side are due; got {self.shape}, rank {self.rank}"
            )

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight as (rows, columns)."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def side(self) -> int:
        """Of a block."""
        return min(self.matrix)

    @property
    def scale(self) -> float:
        """A power of two near 1 / sqrt(n * rank): so many products add up in an entry of the weight."""
        return 2.0 ** -((self.side * self.rank).bit_length() // 2)

    @property
    def blocks(self) -> int:
        """How many blocks fill the larger side."""
        return -(-max(self.matrix) // max(1, self.side))

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.blocks, self.rank, self.side)
        return {"g": shape, "h": shape}

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        return self.joined(self.squares(parts)).reshape(self.shape)

    def squares(self, parts: Mapping[str, Numbers]) -> Numbers:
        """The blocks (blocks, n, n)."""
        g, h = wide(parts["g"]), wide(parts["h"])
        total = g[:, 0, :, None] * h[:, 0, None, :]
        for r in range(1, self.rank):
            total = total + g[:, r, :, None] * h[:, r, None, :]
        return self.summed(self.scale * total)

    def fast(self, parts: Mapping[str, Numbers]) -> Numbers:
        return self.joined(self.summed(self.scale * (parts["g"].swapaxes(1, 2) @ parts["h"]))).reshape(self.shape)

    def summed(self, displacements: Numbers) -> Numbers:
        """The blocks of these displacements, (blocks, n, n) both."""
        steps, n = np.arange(self.side), self.side
        there = (steps[:, None] + steps) % n * n + steps  # [diagonal, k] -> (row, k)
        back = (steps[:, None] - steps) % n * n + steps  # [i, j] -> (diagonal, j)
        sums = double(pick(displacements.reshape(-1, n * n), there)).cumsum(-1)
        halved = narrow(sums - 0.5 * sums[..., -1:], displacements)
        return pick(halved.reshape(-1, n * n), back)

    def joined(self, blocks: Numbers) -> Numbers:
        """(blocks, n, n) -> the matrix, from top to bottom or from left to right."""
        rows, columns = self.matrix
        if rows >= columns:
            return blocks.reshape(-1, self.side)[:rows]
        return contiguous(blocks.swapaxes(0, 1).reshape(self.side, -1)[:, :columns])

    def cut(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """Inverse of :meth:`joined`; zeros where the last block is cut off."""
        rows, columns = self.matrix
        across = matrix if rows >= columns else matrix.T
        padded = np.zeros((self.blocks * self.side, self.side), matrix.dtype)
        padded[: len(across)] = across
        found = padded.reshape(self.blocks, self.side, self.side)
        return found if rows >= columns else found.swapaxes(1, 2)
