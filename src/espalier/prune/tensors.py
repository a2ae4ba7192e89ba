r"""Whole parameter tensors: the crudest pattern, a baseline for all others.

Paper    none
Formula  score of a tensor = its contributions combined;   the floor(sparsity * number of tensors) lowest become zero
Departs  Sparsity is the share of the tensors. Biases and other vectors take part where ``layers`` names them. With
         criterion magnitude this ranks by norm, with a gradient criterion by the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.prune.parts import Pattern, Reduction
from espalier.prune.weights import reduce


@dataclass(frozen=True, kw_only=True)
class Tensors(Pattern):
    """A parameter stays or goes as a whole. ``per_weight``: rank by the score per weight, not by the total."""

    id: ClassVar[str] = "tensors"
    rows: ClassVar[bool] = False
    empties: ClassVar[bool] = True
    vectors: ClassVar[bool] = True
    per_weight: bool = True

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        total = reduce(scores.reshape(-1), (0,), reduction).reshape(1)
        if not self.per_weight or reduction == "mean":
            return total
        return total / (scores.numel() ** 0.5 if reduction == "l2" else scores.numel())

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.expand(shape).clone() if not shape else removed.reshape([1] * len(shape)).expand(shape).clone()
