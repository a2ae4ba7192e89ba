r"""LAMP: magnitudes made comparable between layers by the worst distortion their removal brings.

Paper    Lee, Park, Mo, Ahn, Shin. Layer-Adaptive Sparsity for the Magnitude-based Pruning. ICLR 2021. arXiv:2010.07611
Formula  s_u = w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|, in one tensor;   equal ones by position
Departs  Already pruned weights have score 0 and add nothing. The score of a group is the sum of its weights' scores;
         the paper scores single weights only. Meant for scope global, where the layers' shares come out by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores


def lamp(weight: Tensor) -> Tensor:
    """LAMP scores of one tensor, any shape; the largest weight's is 1, zeros have 0. Sums in float64."""
    squares = weight.detach().reshape(-1).double().square()
    ordered, order = torch.sort(squares, stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # the weight itself and all that come after it
    scores = torch.where(ordered > 0, ordered / rest.clamp_min(torch.finfo(torch.float64).tiny), ordered)
    return torch.empty_like(scores).scatter_(0, order, scores).reshape(weight.shape).float()


@dataclass(frozen=True, kw_only=True)
class Lamp(Criterion):
    """Score = squared weight over the sum of the squares that would still be there when its turn comes."""

    id: ClassVar[str] = "lamp"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {slot.name: lamp(slot.value()) for slot in selection}
