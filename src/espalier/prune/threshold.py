r"""Threshold pruning: every weight below a threshold goes, absolute or relative to the layer's spread.

Paper    Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015.
         arXiv:1506.02626 (section 3.2)
Formula  t = value, or quality * std(w of the layer);   w_i goes where |w_i| < t
Departs  The standard deviation is taken over the weights that are still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Positive
from espalier.core.selection import Selection
from espalier.prune.parts import CutCriterion, Scores


def threshold(weight: Tensor, value: float | None, quality: float) -> float:
    """The threshold of one layer: ``value``, or ``quality`` times the standard deviation of its non-zero weights."""
    if value is not None:
        return value
    kept = weight[weight != 0]
    return quality * float(kept.std(correction=0)) if kept.numel() else 0.0


@dataclass(frozen=True, kw_only=True)
class Threshold(CutCriterion):
    """Score = |w| / t, cut at 1. ``value``: absolute threshold; without it ``quality`` times sigma is used."""

    id: ClassVar[str] = "threshold"
    value: Positive | None = None
    quality: Positive = 1.0

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        found = {}
        for slot in selection:
            weight = slot.value()
            bound = threshold(weight, self.value, self.quality)
            found[slot.name] = weight.abs() / bound if bound > 0 else torch.full_like(weight, torch.inf)
        return found
