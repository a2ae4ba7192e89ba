r"""Singular values: the smallest go, the weight keeps its dense form.

Paper    Xue, Li, Gong. Restructuring of Deep Neural Network Acoustic Models with Singular Value Decomposition.
         Interspeech 2013
Formula  W = U diag(s) V^T as a matrix of outputs by inputs;   W <- sum_{k kept} s_k u_k v_k^T
Departs  Nothing becomes smaller here: the factored form is another method. During training the weight is projected
         again at every update, as training raises the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.prune.parts import Projection, Reduction


def without(weight: Tensor, removed: Tensor) -> Tensor:
    """``weight`` without the singular values marked in ``removed`` (min(m, n),), largest first."""
    u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    kept: Tensor = (u * s.masked_fill(removed, 0)) @ vh
    return kept.reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Singular(Projection):
    """Sparsity is the share of the singular values set to zero."""

    id: ClassVar[str] = "singular"
    rows: ClassVar[bool] = False

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        values: Tensor = torch.linalg.svdvals(scores.flatten(1).double())
        return values.float()

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        """No entry is fixed."""
        return torch.zeros(shape, dtype=torch.bool, device=removed.device)

    def project(self, weight: Tensor, removed: Tensor) -> Tensor:
        return without(weight, removed)
