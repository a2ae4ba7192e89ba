r"""N:M sparsity: of every m neighbours along the inputs n stay.

Paper    Mishra et al. Accelerating Sparse Deep Neural Networks. 2021. arXiv:2104.08378 (2:4);
         Zhou et al. Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch. ICLR 2021.
         arXiv:2102.04010
Formula  in each group g of m inputs of one output (and kernel position): the m - n lowest scores go
Departs  Any n < m. Inputs beyond the last whole group stay dense; a weight of fewer than m inputs is left alone. On a
         schedule the entries that are to go leave in the order of their scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.fields import Group
from espalier.core.ranking import smallest
from espalier.prune.parts import FixedPattern, Reduction
from espalier.prune.weights import reduce


def lowest(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of all but the ``n`` highest of every ``m`` neighbours along dimension 1; ties go to the lower position."""
    whole = scores.shape[1] // m * m
    moved = scores[:, :whole].movedim(1, -1)
    groups = moved.reshape(*moved.shape[:-1], whole // m, m)
    order = groups.argsort(dim=-1, stable=True)
    gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], value=True)
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[:, :whole] = gone.reshape(moved.shape).movedim(-1, 1)
    return removed


@dataclass(frozen=True, kw_only=True)
class NM(FixedPattern):
    """``n`` kept of every ``m`` inputs (input channels of a convolution)."""

    id: ClassVar[str] = "n-m"
    n: Group = 2
    m: Group = 4

    def conflicts(self) -> list[str]:
        return [f"n={self.n} must be below m={self.m}: n weights stay of every m"] if self.n >= self.m else []

    def refuses(self, shape: torch.Size) -> str | None:
        if shape[1] < self.m:
            return f"its {shape[1]} inputs hold no whole group of {self.m}"
        return None

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        return reduce(scores, (), reduction)

    def removed(self, scores: Tensor, share: float) -> Tensor:
        """The lowest of each group; of these, the ``share`` with the lowest scores of the weight."""
        gone = lowest(scores, self.n, self.m)
        if share >= 1:
            return gone
        return smallest(scores.masked_fill(~gone, torch.inf), int(share * int(gone.sum()) + 1e-9)) & gone

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.reshape(shape)
