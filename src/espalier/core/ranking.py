"""Stable selection of the smallest scores: what every criterion shares."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask (bool, shape of ``scores``) of exactly ``count`` smallest scores; ties go to the lower position.

    Introselect, O(n); ``-inf`` marks what is gone already and goes first, so masks nest as ``count`` grows.
    """
    flat = scores.reshape(-1)
    count = min(max(count, 0), flat.numel())
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = torch.kthvalue(flat, count).values
    chosen = flat < bound
    ties = torch.nonzero(flat == bound).reshape(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.reshape(scores.shape)
