r"""Whole output units as masks: channels and neurons whose weights are zero but which are still there.

Paper    Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets. ICLR 2017. arXiv:1608.08710
Formula  group = all weights into one output channel or neuron
Departs  Nothing is removed and coupled layers are left alone: a masked unit still adds its bias. Rows that are looked
         up (an embedding's words) are no units and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.parametrize import Slot
from espalier.prune.grouping import looked_up
from espalier.prune.parts import Pattern, Reduction
from espalier.prune.weights import reduce


@dataclass(frozen=True, kw_only=True)
class Units(Pattern):
    """The rows of each weight. The last weight of the model is left alone unless ``layers`` names it."""

    id: ClassVar[str] = "units"
    units: ClassVar[bool] = True
    rows: ClassVar[bool] = False

    def unfit(self, slot: Slot) -> str | None:
        """Why the rows of the slot are no units, whatever its shape; None where they are."""
        return "its rows are looked up (words), they are no units of a layer" if looked_up(slot) else None

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        return reduce(scores.flatten(1), (1,), reduction)

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
