r"""Monarch weights: two block-diagonal matrices with a permutation before, between and after.

Paper    Dao et al. Monarch: Expressive Structured Matrices for Efficient and Accurate Training. ICML 2022.
         arXiv:2204.00595
Formula  M = P L P^T R;   M[l b + j, k w + i] = L_j[l, k] R_k[j, i];   nearest: each slice (k, j) of W, a matrix over
         (l, i), becomes its best approximation of rank 1, sigma_1 u_1 v_1^T
Departs  The number of blocks follows ``keep``; the paper's is the square root of n for a square matrix. Slices may have
         a higher rank, as the blocks of the authors' rectangular layers give them. The product is computed densely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.fields import Channels, Rank
from espalier.core.parametrize import Slot
from espalier.core.structures import Monarch as Rule
from espalier.share.sharing import Sharing


@dataclass(frozen=True, kw_only=True)
class Monarch(Sharing):
    """A convolution is the matrix (out, in * kernel). Sides that are no multiple of the blocks are as if padded.

    ``blocks``: of each of the two factors, in place of ``keep``. ``rank``: of each slice; with one block it is that
    of the whole matrix. A layer with a short side, such as the output layer, has room for few blocks and loses most.
    """

    id: ClassVar[str] = "monarch"
    keeps_zero_rows: ClassVar[bool] = True
    blocks: Channels | None = None
    rank: Rank = 1

    def structure(self, slot: Slot, context: Context) -> Rule | str:
        """With ``blocks``, or with as many as keep few enough numbers."""
        shape = tuple(slot.shape)
        smaller = min(shape[0], slot.latent.numel() // max(1, shape[0]))
        if smaller < self.rank:
            return f"its smaller side, {smaller}, is below the rank of {self.rank}"
        most = next(n for n in range(smaller, 0, -1) if -(-smaller // n) >= self.rank)

        def made(blocks: int) -> Rule:
            return Rule(shape=shape, blocks=blocks, rank=self.rank)

        if self.blocks is not None:
            return made(min(self.blocks, most))
        return self.largest(made, most, slot, context)

    def project(self, structure: Rule, weight: Tensor, context: Context) -> dict[str, Tensor]:
        """The leading singular vectors of each slice; the singular values go to both sides alike."""
        matrix = weight.reshape(structure.matrix)
        (rows, columns), (height, width), blocks = structure.matrix, structure.slice, structure.blocks
        padded = F.pad(matrix, (0, blocks * width - columns, 0, blocks * height - rows))
        left, values, right = torch.linalg.svd(structure.cut(padded), full_matrices=False)
        root = values[..., : structure.rank].sqrt()
        return {
            "left": left[..., : structure.rank] * root[..., None, :],
            "right": root[..., None] * right[..., : structure.rank, :],
        }
