r"""Attention transfer: where the student's feature maps are strong should be where the teacher's are.

Paper    Zagoruyko, Komodakis. Paying More Attention to Attention: Improving the Performance of Convolutional Neural
         Networks via Attention Transfer. ICLR 2017. arXiv:1612.03928
Formula  Q = vec(mean_c |F_c|^power) / || . ||_2, with one entry for each position;
         code: L = CE + weight sum_l mean (Q_s - Q_t)^2;
         paper: L = CE + weight / 2 sum_l mean_n ||Q_s - Q_t||_2 / positions
Departs  Of maps of different size the larger one is averaged down. The published code and the paper's formula differ:
         both are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Penalty, Positive
from espalier.distill.parts import FeatureLoss
from espalier.distill.places import Pair, Seen


def attention_map(features: Tensor, power: float) -> Tensor:
    """(n, positions) of unit length from features (n, channels, ...)."""
    return F.normalize(features.abs().pow(power).mean(dim=1).flatten(1), dim=1)


@dataclass(frozen=True, kw_only=True)
class Attention(FeatureLoss):
    """By default all pairs of maps that match; vectors have no positions, and are left out."""

    id: ClassVar[str] = "attention"
    per_channel: ClassVar[bool] = False
    mode: Literal["code", "paper"] = "code"
    power: Positive = 2.0
    weight: Penalty = 1000.0

    def found(self, student: Sequence[Seen], teacher: Sequence[Seen]) -> list[Pair]:
        """The matching pairs with positions."""
        return super().found([row for row in student if row.size], teacher)

    def value(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the pairs."""
        terms = []
        for features in pairs:
            q_s, q_t = (attention_map(side, self.power) for side in features)
            if self.mode == "code":
                terms.append((q_s - q_t).square().mean())
            else:
                terms.append(torch.linalg.vector_norm(q_s - q_t, dim=1).mean() / (2 * q_s.shape[1]))
        return self.weight * torch.stack(terms).sum()
