r"""Single weights: the unstructured pattern.

Paper    none
Formula  every entry is a group of its own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.prune.parts import Pattern, Reduction


def reduce(scores: Tensor, dims: tuple[int, ...], reduction: Reduction) -> Tensor:
    """Contributions combined over ``dims``, which disappear; no ``dims``: every entry is its own group."""
    if not dims:
        return scores if reduction in ("sum", "mean") else scores.abs()
    if reduction == "l1":
        return scores.abs().sum(dims)
    if reduction == "l2":
        return scores.square().sum(dims).sqrt()
    if reduction == "mean":
        return scores.mean(dims)
    return scores.sum(dims)


@dataclass(frozen=True, kw_only=True)
class Weights(Pattern):
    """Each weight stands for itself."""

    id: ClassVar[str] = "weights"

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        return reduce(scores, (), reduction)

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.reshape(shape)
