"""Weights with parts that are equal: rows that are one row, kernels that are one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from espalier.core.structures.arrays import pick, wide
from espalier.core.structures.structure import Numbers, Structure


@dataclass(frozen=True)
class TiedRows(Structure):
    """``W[o] = rows[index[o]]``: neurons of a layer, filters of a convolution, words of an embedding.

    ``index``: one number for each row; those from 0 to the largest all occur.
    """

    kind: ClassVar[str] = "tied-rows"
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = self.shape[0] if len(self.shape) > 1 else 0
        if not rows or len(self.index) != rows or set(self.index) != set(range(len(set(self.index)))):
            raise ValueError(f"one number for each of {rows} rows is due, none left out; got {str(self.index)[:80]}")

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"rows": (max(self.index) + 1, math.prod(self.shape[1:]))}

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        return pick(parts["rows"], np.array(self.index), 0).reshape(self.shape)


@dataclass(frozen=True)
class TiedKernels(Structure):
    """``W[o, i, ...] = scales[o, i] * kernels[o, ...]``: every filter has one kernel, scaled for each input channel."""

    kind: ClassVar[str] = "tied-kernels"

    def __post_init__(self) -> None:
        if len(self.shape) < 3:
            raise ValueError(f"a weight with a kernel, of three dimensions or more, is due; got {self.shape}")

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scales": self.shape[:2], "kernels": (self.shape[0], math.prod(self.shape[2:]))}

    def dense(self, parts: Mapping[str, Numbers]) -> Numbers:
        return (wide(parts["scales"])[:, :, None] * wide(parts["kernels"])[:, None]).reshape(self.shape)
