"""Structures: how a weight is made from few numbers, the same in the decoder (NumPy) and in training (torch)."""

from __future__ import annotations

from espalier.core.structures.circulant import Circulant
from espalier.core.structures.hashed import Hashed
from espalier.core.structures.low_rank import LowRank
from espalier.core.structures.monarch import Monarch
from espalier.core.structures.structure import STRUCTURES, Structure, register_structure, structure_of
from espalier.core.structures.tied import TiedKernels, TiedRows
from espalier.core.structures.toeplitz import Toeplitz

for _structure in (LowRank, Circulant, Toeplitz, Monarch, Hashed, TiedRows, TiedKernels):
    register_structure(_structure)

__all__ = [
    "STRUCTURES", "Circulant", "Hashed", "LowRank", "Monarch", "Structure", "TiedKernels", "TiedRows", "Toeplitz",
    "register_structure", "structure_of",
]  # fmt: skip
