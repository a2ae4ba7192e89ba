"""Structures: how a weight is made from few numbers, the same in the decoder (NumPy) and in training (torch)."""

from __future__ import annotations

from espalier.core.structures.low_rank import LowRank
from espalier.core.structures.structure import STRUCTURES, Structure, register_structure, structure_of

register_structure(LowRank)

__all__ = ["STRUCTURES", "LowRank", "Structure", "register_structure", "structure_of"]
