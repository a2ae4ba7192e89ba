"""The four axes of pruning: criterion x pattern x scope x schedule. A method is a small file for one axis."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.core.selection import Selection

Scores = dict[str, Tensor]
"""Weight name -> scores of the weight's shape; low goes first."""


@dataclass(frozen=True, kw_only=True)
class Criterion(Method):
    """How much each weight matters. ``default_sparsity``: what is removed when the user names no sparsity."""

    kind: ClassVar[str] = "criterion"
    default_sparsity: ClassVar[float | None] = 0.5

    @abstractmethod
    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        """Scores of the effective weights."""


@dataclass(frozen=True, kw_only=True)
class CutCriterion(Criterion):
    """A criterion that knows itself which weights go: those with a score below 1."""

    default_sparsity: ClassVar[float | None] = None

    def removed(self, scores: Scores, fraction: float) -> dict[str, Tensor]:
        """Masks of what goes when the cut has grown to ``fraction`` of its final height."""
        return {name: score < fraction for name, score in scores.items()}


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """What goes together: single weights, blocks, channels ..."""

    kind: ClassVar[str] = "pattern"

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Scores of the groups of one weight, from the scores of its entries."""

    @abstractmethod
    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        """Mask over the groups -> mask over the entries of a weight of ``shape``."""


@dataclass(frozen=True, kw_only=True)
class Scope(Method):
    """Among which weights the lowest scores are sought."""

    kind: ClassVar[str] = "scope"

    @abstractmethod
    def removed(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        """Masks of the groups that go: a fraction ``sparsity`` of all groups."""


@dataclass(frozen=True, kw_only=True)
class Schedule(Method):
    """How sparsity grows during training."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def sparsity(self, progress: float, final: float) -> float:
        """The sparsity at ``progress`` (0..1) of the training that ends at ``final``."""

    @property
    def final(self) -> float | None:
        """The sparsity this schedule itself ends at, where it names one."""
        return None
