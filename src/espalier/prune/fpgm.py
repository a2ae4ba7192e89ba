r"""FPGM: the filters nearest to the geometric median of their layer go, as the others can stand in for them.

Paper    He, Liu, Wang, Hu, Yang. Filter Pruning via Geometric Median for Deep Neural Networks Acceleration. CVPR 2019.
         arXiv:1811.00250
Formula  d_j = sum_k ||F_j - F_k||_2 over all filters k of the layer;   s_j = d_j / mean_k d_k
Departs  The paper prunes and re-grows softly in every epoch and mixes with a norm criterion; both are the business of
         the schedule. It ranks by d_j; the division changes no ranking inside a layer and makes layers of different
         width and scale comparable under scope global. Linear layers have filters here too: their rows. Embeddings have
         none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.grouping import looked_up
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import unit_rows

_CHUNK = 1 << 22  # distances held at a time


def distances(filters: Tensor) -> Tensor:
    """(n, d) filters -> (n,) sum of Euclidean distances to all filters, a few rows of the n x n table at a time."""
    wide = filters.detach() if filters.dtype in (torch.float32, torch.float64) else filters.detach().float()
    rows = max(1, _CHUNK // max(len(wide), 1))
    exact = "donot_use_mm_for_euclid_dist"  # the fast form loses what near filters differ by
    return torch.cat([torch.cdist(part, wide, compute_mode=exact).sum(1) for part in torch.split(wide, rows)])


def relative(filters: Tensor) -> Tensor:
    """(n, d) filters -> (n,) sums of distances, divided by their mean; all 0 where all filters are the same."""
    total = distances(filters)
    return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Criterion):
    """Score of an output unit = its distance to the layer's units, relative to the mean of the layer."""

    id: ClassVar[str] = "fpgm"
    of = "units"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        found = {}
        for slot in selection:
            if looked_up(slot):  # as many distances as pairs of words, and no unit to judge by them
                context.skip(slot.name, "its rows are looked up (words), they are no units of a layer")
            else:
                found[slot.name] = relative(unit_rows(slot))
        return found
