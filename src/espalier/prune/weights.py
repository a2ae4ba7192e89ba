r"""Single weights: the unstructured pattern.

Paper    none
Formula  every entry is a group of its own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.prune.parts import Pattern


@dataclass(frozen=True, kw_only=True)
class Weights(Pattern):
    """Each weight stands for itself."""

    id: ClassVar[str] = "weights"

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        return removed.reshape(shape)
