r"""HRank: the channels whose feature maps have low rank go.

Paper    Lin, Ji, Wang, Zhang, Zhang, Tian, Shao. HRank: Filter Pruning using High-Rank Feature Map. CVPR 2020.
         arXiv:2002.10179
Formula  s_u = mean over samples of rank(o_u(x)),   o_u(x): the H x W feature map
Departs  The map is taken after the activation (the paper's code hooks ReLUs too). Units without a two-dimensional map
         (linear layers, 1-d convolutions) have one of a single row, so their rank says whether it is zero; maps of
         three dimensions are matrices of (depth x height) rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import averages


def ranks(activation: Tensor) -> Tensor:
    """(samples, units, *positions) -> (samples, units): numerical rank of each map, singular values in one batch."""
    maps = activation.flatten(2, -2) if activation.ndim > 4 else activation
    if maps.ndim < 4:
        return (maps != 0).flatten(2).any(2).double() if maps.ndim > 2 else (maps != 0).double()
    rank: Tensor = torch.linalg.matrix_rank(maps if maps.dtype == torch.float64 else maps.float())
    return rank.double()


@dataclass(frozen=True, kw_only=True)
class HRank(Criterion):
    """Score of an output unit = the mean rank of its feature maps; one singular value decomposition per map."""

    id: ClassVar[str] = "hrank"
    of = "units"
    batches: Batches = 4

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return averages(model, selection, context, lambda a, _: ranks(a), count=self.batches, label="feature maps")
