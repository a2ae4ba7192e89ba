"""Finite sets of values, shared by the methods that are not uniform: which one is nearest, without a table of n x k."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.core.quantized import by_channel


def midpoints(levels: Tensor) -> Tensor:
    """The thresholds (..., k - 1) between neighbours of rising ``levels`` (..., k)."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def look_up(values: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """``levels[i]`` where ``thresholds[i - 1] < value <= thresholds[i]``, in the dtype of ``values``.

    ``levels`` (k,) and ``thresholds`` (k - 1,), both rising. The search runs in float32.
    """
    found = levels[torch.bucketize(in_float32(values).contiguous(), thresholds)]
    return found if found.dtype == values.dtype else found.to(values.dtype)


def in_float32(values: Tensor) -> Tensor:
    """``values`` in float32; no operator is recorded where they are."""
    return values if values.dtype == torch.float32 else values.float()


def with_signs(magnitudes: Tensor) -> Tensor:
    """Rising ``magnitudes`` (k,), the first zero -> the 2k - 1 values of both signs, rising."""
    return torch.cat([-magnitudes[1:].flip(0), magnitudes]) + 0  # what underflowed is 0.0, not -0.0


def kept_values(values: Tensor, kept: Tensor | None) -> Tensor:
    """The values that were not pruned, 1-D, float32; a single zero where none are left."""
    chosen = values.detach().reshape(-1) if kept is None else values.detach()[kept]
    return chosen.float() if chosen.numel() else values.new_zeros(1, dtype=torch.float32)


def largest(values: Tensor, kept: Tensor | None, axis: int | None) -> Tensor:
    """The largest magnitude of the kept values of each channel (channels,); of all, shape (), without ``axis``."""
    magnitudes = values.detach().float().abs()
    if kept is not None:
        magnitudes = torch.where(kept, magnitudes, 0)
    rows = by_channel(magnitudes, axis)
    found = rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    return found if axis is not None else found[0]
