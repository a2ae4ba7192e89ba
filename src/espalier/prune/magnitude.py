r"""Magnitude pruning: the smallest absolute weights go.

Paper    Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015.
         arXiv:1506.02626
Formula  s_i = |w_i|;   the floor(sparsity * n) smallest go;   a group by its l1 or l2 norm
Departs  The share removed is given, the paper derives it from a threshold (see threshold);
         retraining is the epochs of prune.prune or a following train.finetune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Reduction, Scores


def magnitude(weight: Tensor) -> Tensor:
    """|w|, any shape."""
    return weight.abs()


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Score = absolute value. ``norm``: of a group, 1 the sum of the absolute values, 2 the Euclidean norm."""

    id: ClassVar[str] = "magnitude"
    norm: Literal[1, 2] = 1

    @property
    def reduction(self) -> Reduction:
        return "l1" if self.norm == 1 else "l2"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {slot.name: magnitude(slot.value()) for slot in selection}
