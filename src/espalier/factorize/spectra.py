"""Singular values and vectors by the eigenvectors of the smaller Gram matrix: what all splits are computed with.

The Gram matrix squares the singular values, so that the smallest drown in rounding errors; they are measured again as
what the matrix has along each vector.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

EMPTY = 1e-12
"""Below this share of the largest a singular value counts as none."""


def gram_vectors(gram: Tensor) -> Tensor:
    """Eigenvectors (..., n, n) of a Gram matrix in columns, those of the largest eigenvalues first."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(-1)


def left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(..., m, n) -> (..., m, rank) with orthonormal columns: the leading left singular vectors."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        return gram_vectors(matrix @ matrix.mT)[..., :rank]
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return vectors[..., :rank]


def singular_values(matrix: Tensor) -> Tensor:
    """(..., m, n) -> (..., min(m, n)) float64, largest first."""
    wide = _wide(matrix).double()
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return values.flip(-1).clamp(min=0).sqrt()


class Decomposed:
    """The singular value decomposition of ``matrix`` (..., m, n), computed once, when it is asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular values (..., k), k = min(m, n), vectors of the shorter side (..., k, k), and S times the others."""
        wide = _wide(self.matrix)
        vectors = gram_vectors(wide @ wide.mT)
        along = vectors.mT @ wide
        values, order = along.norm(dim=-1).sort(dim=-1, descending=True)
        vectors = torch.take_along_dim(vectors, order[..., None, :], -1)
        return values, vectors, torch.take_along_dim(along, order[..., :, None], -2)

    @property
    def values(self) -> Tensor:
        """Singular values (..., k), largest first."""
        return self.parts[0]

    def balanced(self, rank: int) -> tuple[Tensor, Tensor]:
        """``U sqrt(S)`` (..., m, rank) and ``sqrt(S) V^T`` (..., rank, n): the best approximation of ``rank``.

        Both factors share the singular values evenly, which keeps fine-tuning stable.
        """
        values, vectors, along = self.parts
        root = values[..., :rank].sqrt()
        there = values[..., :rank] > EMPTY * values[..., :1]
        inverse = torch.where(there, 1 / torch.where(there, root, 1.0), 0.0)
        short, long = vectors[..., :rank] * root[..., None, :], along[..., :rank, :] * inverse[..., :, None]
        return (short, long) if self.matrix.shape[-2] <= self.matrix.shape[-1] else (long.mT, short.mT)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
