"""The score of a unit: the contributions of every weight that goes with it, across all the layers it couples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from espalier.core.parametrize import slots
from espalier.graph.channels import Group, Place
from espalier.prune.parts import Criterion, Reduction, Scores


def unit_scores(
    groups: Sequence[Group], scores: Scores, criterion: Criterion, transposed: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Scores of the units of every group, shape (size,), from scores of weights or of output units.

    A group with a unit that nothing scores is left out. Layers that share units and are scored by the unit count alike,
    whatever the scale of their scores. ``transposed``: weight -> convolution groups where inputs are stored first.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        parts: list[tuple[Tensor, Tensor, int]] = []
        for place in group.places:
            score = scores.get(place.tensor)
            vector, each = (None, 0) if score is None else _along(score, place, criterion, transposed or {})
            if vector is not None:
                parts.append((torch.from_numpy(place.unit), vector[torch.from_numpy(place.index)], each))
        if criterion.of == "units" and len(parts) > 1:
            sizes = [float(vector.abs().mean().clamp_min(1e-30)) for _, vector, _ in parts]
            usual = sum(sizes) / len(sizes)
            parts = [(unit, vector * (usual / size), n) for (unit, vector, n), size in zip(parts, sizes, strict=True)]
        total = torch.zeros(group.size, dtype=torch.float64)
        count = torch.zeros(group.size, dtype=torch.float64)
        for unit, vector, each in parts:
            total.index_add_(0, unit, vector)
            count.index_add_(0, unit, torch.full((len(unit),), float(each), dtype=torch.float64))
        if bool((count > 0).all()):
            found[group.name] = _reduced(total, count, "mean" if criterion.of == "units" else criterion.reduction)
    return found


def transposed_weights(model: nn.Module) -> dict[str, int]:
    """Weight name -> groups of every transposed convolution."""
    return {
        slot.name: int(slot.module.groups)
        for slot in slots(model).values()
        if isinstance(slot.module, _ConvTransposeNd) and slot.owners[0][2] == "weight"
    }


def _along(
    score: Tensor, place: Place, criterion: Criterion, transposed: Mapping[str, int]
) -> tuple[Tensor | None, int]:
    """Contributions summed over every dimension but the place's, and how many weights each sum holds."""
    score, dim = score.detach().double().cpu(), place.dim
    if criterion.of == "units":
        if place.tensor in transposed:  # (inputs, outputs / groups, ...): one column stands for a unit of every group
            return (score.reshape(transposed[place.tensor], -1).mean(0), 1) if dim == 1 else (None, 0)
        return (score, 1) if dim == 0 else (None, 0)
    if criterion.reduction == "l1":
        score = score.abs()
    elif criterion.reduction == "l2":
        score = score.square()
    others = [n for n in range(score.ndim) if n != dim]
    return (score.sum(others) if others else score), score.numel() // max(1, score.shape[dim])


def _reduced(total: Tensor, count: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "l2":
        return total.sqrt()
    return total / count.clamp_min(1) if reduction == "mean" else total
