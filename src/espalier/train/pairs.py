"""Inputs and outputs of one layer over some batches, samples first: what a layer is solved or a block is fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.core.errors import NumericError

Kept = list[tuple[Tensor, Tensor]]


def samples(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Samples first: rows for a linear layer, images for a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - a convolution
    return (x, y) if x.ndim == weight.ndim else (x[None], y[None])


def part(x: Tensor, y: Tensor, numbers: int, generator: torch.Generator) -> Kept:
    """A random part of the samples that holds so many ``numbers`` at most, one sample at least, on the CPU.

    Nothing where there is no sample, or not as many of both.
    """
    if not len(x) or len(x) != len(y):
        return []
    count = max(1, numbers // (x[0].numel() + y[0].numel()))
    if count < len(x):
        chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
        x, y = x[chosen], y[chosen]
    return [(x.cpu(), y.cpu())]


def joined(kept: Sequence[tuple[Tensor, Tensor]], name: str) -> tuple[Tensor, Tensor] | None:
    """All that has the shape of the first; None where nothing was kept. Raises ``NumericError`` for NaN or infinity."""
    alike = [(x, y) for x, y in kept if x.shape[1:] == kept[0][0].shape[1:]]
    if not alike:
        return None
    x, y = torch.cat([x for x, _ in alike]), torch.cat([y for _, y in alike])
    if not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
        raise NumericError(f"the inputs or outputs of {name} hold NaN or infinity; nothing can be solved on them.")
    return x, y
