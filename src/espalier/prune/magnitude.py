r"""Magnitude pruning: the smallest absolute weights go.

Paper    Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015.
         arXiv:1506.02626
Formula  s_i = |w_i|;   the floor(sparsity * n) smallest go
Departs  The share removed is given, the paper derives it from a threshold (see threshold);
         retraining is the epochs of prune.prune or a following train.finetune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores


def magnitude(weight: Tensor) -> Tensor:
    """|w|, any shape."""
    return weight.abs()


@dataclass(frozen=True, kw_only=True)
class Magnitude(Criterion):
    """Score = absolute value."""

    id: ClassVar[str] = "magnitude"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {slot.name: magnitude(slot.value()) for slot in selection}
