r"""Feature distillation: the student's features are drawn to the teacher's by a distance of choice.

Paper    Heo, Kim, Yun, Park, Kwak, Choi. A Comprehensive Overhaul of Feature Distillation. ICCV 2019. arXiv:1904.01866
Formula  L = CE + weight sum_l d(A_l(F_s), F_t),   d: mean of squares, of absolute or Huber differences, or
         1 - cosine over the channels;   A_l: 1x1 convolution where the channels differ
Departs  The general form that the paper compares methods in, without its margin ReLU and partial L2 distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Penalty
from espalier.distill.parts import FeatureLoss


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cosine`` between the channels (dimension 1) at each position, averaged."""
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss, "l1": F.l1_loss, "smooth-l1": F.smooth_l1_loss, "cosine": cosine,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Features(FeatureLoss):
    """``adapters``: where a linear map stands between the channels. By default all pairs that match."""

    id: ClassVar[str] = "features"
    distance: Literal["mse", "l1", "cosine", "smooth-l1"] = "mse"
    adapters: Literal["where-needed", "always", "never"] = "where-needed"
    weight: Penalty = 1.0

    @property
    def adapts(self) -> Literal["always", "where-needed", "never"]:
        """As the field says."""
        return self.adapters

    def value(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the pairs."""
        distance = DISTANCES[self.distance]
        return self.weight * torch.stack([distance(student, teacher) for student, teacher in pairs]).sum()
