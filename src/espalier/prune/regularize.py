r"""Sparsity by a penalty while training, with zeros that are exact and stay.

Paper    Wen et al. 2016, arXiv:1608.03665; Liu et al. 2017, arXiv:1708.06519; Louizos et al. 2018, arXiv:1712.01312;
         Wang et al. 2021, arXiv:2012.09243: see the penalties
Formula  min L(w) + penalty(w) for a share ``until`` of the steps;   m = [w != 0];   then min L(m * w)
Departs  The papers fix the zeros at the end and fine-tune in a second run; here the last share of the same run repairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection
from espalier.prune.l1 import L1
from espalier.prune.penalty import SparsityPenalty
from espalier.prune.sparsifier import Sparsifier, SparsifyingTraining


@dataclass(frozen=True, kw_only=True)
class Regularize(SparsifyingTraining):
    """Trains with ``penalty``. Rows and columns that are wholly zero are left for a step that removes channels."""

    id: ClassVar[str] = "regularize"
    penalty: SparsityPenalty = field(default_factory=L1)

    @property
    def outputs(self) -> bool:
        return self.penalty.outputs

    def refuses(self, slot: Slot) -> str | None:
        return self.penalty.refuses(slot)

    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        return self.penalty.start(model, selection, context)
