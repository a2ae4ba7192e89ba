r"""Threshold pruning: every weight below a threshold goes, absolute or relative to the layer's spread.

Paper    Han, Pool, Tran, Dally. Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015.
         arXiv:1506.02626 (section 3.2)
Formula  t = value, or quality * std(w of the layer);   w_i goes where |w_i| < t
Departs  t is fixed once, over the weights that are there when the step starts: a spread taken again over what is left
         rises with every cut. While training the cut is made at each move of the schedule, at |w_i| < u t, u the share
         reached; weights that training moves below it later stay. A layer keeps the scope's floor, and one weight at
         least. For the paper's rounds, with a new spread in each, put several steps in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def against(selection: Selection, bounds: Mapping[str, float]) -> Scores:
    """|w| / t of every weight; inf where t is zero, which nothing lies below."""
    found = {}
    for slot in selection:
        weight, bound = slot.value(), bounds[slot.name]
        found[slot.name] = weight.abs() / bound if bound > 0 else torch.full_like(weight, torch.inf)
    return found


@dataclass(frozen=True, kw_only=True)
class Threshold(CutCriterion):
    """Score = |w| / t, cut at 1. ``value``: absolute threshold; without it ``quality`` times sigma is used."""

    id: ClassVar[str] = "threshold"
    value: Positive | None = None
    quality: Positive = 1.0

    def bounds(self, selection: Selection) -> dict[str, float]:
        """The threshold of every layer, from the weights as they are now."""
        return {slot.name: threshold(slot.value(), self.value, self.quality) for slot in selection}

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return against(selection, self.bounds(selection))
