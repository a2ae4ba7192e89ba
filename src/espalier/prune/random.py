r"""Random pruning: the honest baseline every criterion must beat.

Paper    none
Formula  s_i ~ U(0, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores


@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Score = a uniform random number that belongs to the weight's position for the whole step."""

    id: ClassVar[str] = "random"

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {
            slot.name: torch.rand(slot.shape, generator=context.generator(slot.name)).to(slot.latent.device)
            for slot in selection
        }
