r"""Block sparsity: rectangles of the weight, seen as a matrix of outputs by inputs, stay or go as a whole.

Paper    Narang, Undersander, Diamos. Block-Sparse Recurrent Neural Networks. 2017. arXiv:1711.02782
Formula  blocks of height x width from the upper left;   score = reduction over the block;   the lowest go
Departs  Any criterion, the paper takes the largest magnitude of a block. The matrix of a convolution has one row for
         each filter. Blocks cut off by the border are scored as if they were whole: by score per weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.fields import Group
from espalier.prune.parts import Pattern, Reduction
from espalier.prune.weights import reduce


def blocked(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``(m, n)`` -> ``(m / rows, n / columns, rows, columns)``, rounded up; zeros beyond the border."""
    m, n = matrix.shape
    padded = F.pad(matrix, (0, -n % columns, 0, -m % rows))
    return padded.reshape(-(-m // rows), rows, -(-n // columns), columns).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Blocks(Pattern):
    """Blocks of ``height`` outputs by ``width`` inputs."""

    id: ClassVar[str] = "blocks"
    height: Group = 4
    width: Group = 4

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        matrix = scores.flatten(1)
        count = blocked(torch.ones_like(matrix), self.height, self.width).sum((-2, -1))
        pooled = reduce(blocked(matrix, self.height, self.width), (-2, -1), reduction)
        whole = self.height * self.width / count
        return pooled * (whole.sqrt() if reduction == "l2" else whole)

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        wide = removed.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        return wide[: shape[0], : math.prod(shape[1:])].reshape(shape)
