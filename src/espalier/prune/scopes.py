r"""Scopes: the same sparsity in every layer, or one ranking over all layers.

Paper    none
Formula  layer: floor(s * n_l) of each layer;   global: floor(s * sum n_l) of all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.core.ranking import smallest
from espalier.prune.parts import Scope, Scores


@dataclass(frozen=True, kw_only=True)
class Layer(Scope):
    """Each layer loses the same fraction."""

    id: ClassVar[str] = "layer"

    def removed(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        return {name: smallest(score, int(sparsity * score.numel() + 1e-9)) for name, score in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Global(Scope):
    """One ranking over all layers; a layer of small weights loses more."""

    id: ClassVar[str] = "global"

    def removed(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        if not scores:
            return {}
        together = torch.cat([score.reshape(-1) for score in scores.values()])
        removed = smallest(together, int(sparsity * together.numel() + 1e-9))
        parts = torch.split(removed, [score.numel() for score in scores.values()])
        return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
