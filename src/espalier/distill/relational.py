r"""Relational distillation: the distances and the angles between the samples of a batch are the teacher's.

Paper    Park, Kim, Lu, Cho. Relational Knowledge Distillation. CVPR 2019. arXiv:1904.05068
Formula  d_ij = ||x_i - x_j|| / mean of the positive ones;   a_ijk = cos of the angle at x_j between x_i and x_k;
         L = CE + distance mean h(d_s - d_t) + angle mean h(a_s - a_t),   h: Huber's function
Departs  None. The means are over all pairs and triples, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Penalty
from espalier.distill.parts import FeatureLoss
from espalier.distill.places import Pair, Seen


def apart(x: Tensor) -> Tensor:
    """(n, n) distances between rows (n, d); exactly 0 for equal rows, with gradient 0."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def distances(x: Tensor) -> Tensor:
    """(n, n) distances in units of the mean of the positive ones."""
    d = apart(x)
    mean = d.sum() / (d > 0).sum().clamp_min(1)
    return d / mean.clamp_min(torch.finfo(d.dtype).tiny)


def angles(x: Tensor) -> Tensor:
    """(n, n, n): the cosine of the angle at row j between rows i and k of (n, d), at [j, i, k]; 0 where rows are equal.

    (x_i - x_j)(x_k - x_j) = g_ik - g_ij - g_jk + g_jj with the products g of centred rows: n^3 numbers, whatever d is.
    """
    x = x - x.mean(dim=0)
    g = x @ x.T
    product = g[None] - g[:, :, None] - g[:, None, :] + g.diagonal()[:, None, None]
    d = apart(x)
    inverse = torch.where(d > 0, 1 / d.masked_fill(d == 0, 1), 0.0)
    return product * inverse[:, :, None] * inverse[:, None, :]


@dataclass(frozen=True, kw_only=True)
class Relational(FeatureLoss):
    """``distance``, ``angle``: weights. By default on what the last layer with weights is handed in each network."""

    id: ClassVar[str] = "relational"
    aligned: ClassVar[bool] = False
    distance: Penalty = 25.0
    angle: Penalty = 50.0

    def conflicts(self) -> list[str]:
        """One of both has to count."""
        return ["distance and angle are both 0: nothing is left"] if not self.distance and not self.angle else []

    def found(self, student: Sequence[Seen], teacher: Sequence[Seen]) -> list[Pair]:
        """The inputs of the last layers."""
        ends = [[row.place for row in side if row.weighted and row.place.side == "in"] for side in (student, teacher)]
        return [(ends[0][-1], ends[1][-1])] if all(ends) else []

    def value(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the pairs."""
        terms = []
        for features in pairs:
            x_s, x_t = (side.flatten(1) for side in features)
            if self.distance:
                terms.append(self.distance * F.smooth_l1_loss(distances(x_s), distances(x_t)))
            if self.angle:
                terms.append(self.angle * F.smooth_l1_loss(angles(x_s), angles(x_t)))
        return torch.stack(terms).sum()
