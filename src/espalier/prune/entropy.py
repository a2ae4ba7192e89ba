r"""Entropy: the units whose activation tells least about the input go.

Paper    Luo, Wu. An Entropy-based Pruning Method for CNN Compression. 2017. arXiv:1706.05791
Formula  s_u = -sum_k p_k log p_k,   p = histogram over samples of the (global average pooled) activation of u, m bins
Departs  The number of bins is a field: the paper leaves it open. Bins of equal width span each unit's own range,
         so the scale of a unit does not count. Natural logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches, Bins
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import stream


def entropy(values: Tensor, bins: int) -> Tensor:
    """(samples, units) -> (units,): entropy in nats of each unit's histogram; a constant unit has 0."""
    values = values.double()
    low, high = values.amin(0), values.amax(0)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    index = ((values - low) / width * bins).long().clamp_(0, bins - 1)
    counts = values.new_zeros(bins, values.shape[1]).scatter_add_(0, index, torch.ones_like(values))
    share: Tensor = counts / len(values)
    return -(share * torch.where(share > 0, share, torch.ones_like(share)).log()).sum(0).float()


@dataclass(frozen=True, kw_only=True)
class Entropy(Criterion):
    """Score of an output unit = the entropy of its pooled activation over ``batches`` training batches."""

    id: ClassVar[str] = "entropy"
    of = "units"
    bins: Bins = 32
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train"})

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        pooled: dict[str, list[Tensor]] = {}

        def add(name: str, activation: Tensor, _: Tensor | None) -> None:
            pooled.setdefault(name, []).append(activation.flatten(2).mean(2) if activation.ndim > 2 else activation)

        stream(model, selection, context, add, count=self.batches, label="activations")
        names = [slot.name for slot in selection if slot.name in pooled]
        return {name: entropy(torch.cat(pooled[name]), self.bins) for name in names}
