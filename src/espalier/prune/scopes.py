r"""Scopes: the same sparsity in every layer or row, or one ranking over all layers, or one per kind of layer.

Paper    Sun, Liu, Bair, Kolter. A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024.
         arXiv:2306.11695 (row: one comparison group per output)
Formula  layer: floor(s * n_l) of each layer;   row: floor(s * n_r) of each output row;   global: floor(s * sum n_l)
         of all;   apart: global among the convolutions and global among the rest
Departs  Every layer keeps a share ``floor``, and at least one group: what the floor protects is ranked last.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.core.ranking import smallest
from espalier.core.selection import Selection
from espalier.prune.parts import Scope, Scores


def protected(scores: Tensor, floor: float) -> Tensor:
    """Mask of the ``max(1, ceil(floor * n))`` best groups that are still there (``-inf``: gone already)."""
    there = int((scores > -torch.inf).sum())
    count = min(there, max(1, math.ceil(floor * scores.numel() - 1e-9)))
    if count == scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    return ~smallest(scores, scores.numel() - count)


def pick(scores: Tensor, sparsity: float) -> Tensor:
    """The ``floor(sparsity * n)`` lowest of one tensor."""
    return smallest(scores, int(sparsity * scores.numel() + 1e-9))


@dataclass(frozen=True, kw_only=True)
class Ranking(Scope):
    """A scope that is one way to rank; the floor is the same for all."""

    @abstractmethod
    def rank(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        """What goes, floor or not."""

    def removed(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        """What goes; the protected groups come last and stay."""
        if not sparsity:  # a ranking of nothing costs a sort all the same
            return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
        held = {name: protected(score, self.floor) for name, score in scores.items()}
        ranked = self.rank({name: score.masked_fill(held[name], torch.inf) for name, score in scores.items()}, sparsity)
        return {name: gone & ~held[name] for name, gone in ranked.items()}

    def clamped(self, scores: Scores, sparsity: float) -> tuple[str, ...]:
        """The weights whose protected groups would have gone."""
        gone = self.rank(scores, sparsity)
        return tuple(name for name, score in scores.items() if bool((gone[name] & protected(score, self.floor)).any()))


@dataclass(frozen=True, kw_only=True)
class Layer(Ranking):
    """Each layer loses the same fraction."""

    id: ClassVar[str] = "layer"

    def apart(self, selection: Selection) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in selection.names)

    def rank(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        return {name: pick(score, sparsity) for name, score in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Row(Ranking):
    """Each output row of each layer loses the same fraction."""

    id: ClassVar[str] = "row"

    def rank(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        found = {}
        for name, score in scores.items():
            rows = score.reshape(len(score), -1)
            order = rows.argsort(dim=1, stable=True)
            gone = torch.zeros_like(rows, dtype=torch.bool)
            gone.scatter_(1, order[:, : int(sparsity * rows.shape[1] + 1e-9)], value=True)
            found[name] = gone.reshape(score.shape)
        return found


@dataclass(frozen=True, kw_only=True)
class Global(Ranking):
    """One ranking over all layers; a layer of small weights loses more."""

    id: ClassVar[str] = "global"

    def rank(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        if not scores:
            return {}
        removed = pick(torch.cat([score.reshape(-1) for score in scores.values()]), sparsity)
        parts = torch.split(removed, [score.numel() for score in scores.values()])
        return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Apart(Global):
    """Convolutions and all other layers in a global ranking each: their weights differ in scale and in cost."""

    id: ClassVar[str] = "apart"

    def apart(self, selection: Selection) -> tuple[tuple[str, ...], ...]:
        """The convolutions, and the rest."""
        convolutions = tuple(slot.name for slot in selection if is_convolution(slot.module))
        rest = tuple(name for name in selection.names if name not in set(convolutions))
        return tuple(names for names in (convolutions, rest) if names)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, transposed or not."""
    return isinstance(module, _ConvNd)
