"""Patterns that remove instead of masking, and how far a step with one goes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.prune.parts import Pattern, Reduction

if TYPE_CHECKING:
    from espalier.prune.prune import Prune


@dataclass(frozen=True, kw_only=True)
class Removing(Pattern):
    """A pattern whose groups are removed, not masked: it does the whole work of ``prune.prune`` itself."""

    rows: ClassVar[bool] = False

    @abstractmethod
    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """What ``method`` does to ``model``, a copy it owns."""

    def misfits(self, method: Prune) -> list[str]:
        """Fields of ``method`` that mean nothing where something is removed."""
        found = []
        if method.rewind != "none":
            found.append(f"rewind={method.rewind} goes back to earlier weights; pattern {self.id} has removed some")
        if isinstance(method.sparsity, Mapping):
            found.append(f"pattern {self.id} takes one sparsity, not one per layer")
        return found

    def no_say(self, method: Prune, *, criterion: bool, scope: bool) -> list[str]:
        """Sentences about parts that were chosen but would not be asked."""
        found = []
        if criterion and type(method.criterion).id != "magnitude":
            found.append(f"pattern {self.id} judges by itself; criterion {method.criterion.id} has no say")
        if scope and method.scope.id != "layer":
            found.append(f"pattern {self.id} ranks over the whole model; scope={method.scope.id} has no say")
        return found

    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        """There are no masks to pool scores for."""
        raise UsageError(f"{self.name} removes; it has no masks.")

    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        """There are no masks to spread."""
        raise UsageError(f"{self.name} removes; it has no masks.")


def final_sparsity(method: Prune) -> float:
    """The share that is gone at the end."""
    if isinstance(method.sparsity, Mapping):
        raise UsageError(f"{method.name}: pattern {method.pattern.id} takes one sparsity, not one per layer.")
    default = method.schedule.final if method.schedule.final is not None else method.criterion.default_sparsity
    return float(method.sparsity if method.sparsity is not None else default if default is not None else 0.5)


def settled(method: Prune) -> int:
    """Epochs until the schedule has reached its end: earlier structures are no candidates for the best."""
    schedule, epochs = method.schedule, method.epochs
    return sum(schedule.share(schedule.at_epoch(epoch, epochs)) < 1 for epoch in range(epochs))
