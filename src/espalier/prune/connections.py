"""What ``prune.loss-prune`` ranks by: a score of every weight of an untrained network."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.core.selection import Selection
from espalier.prune.parts import Scores
from espalier.prune.scopes import Global


def lowest_removed(scores: Scores, sparsity: float) -> dict[str, Tensor]:
    """Masks of what stays: all but the ``floor(sparsity * n)`` lowest over all layers; one weight of each stays."""
    return {name: ~gone for name, gone in Global().removed(scores, sparsity).items()}


@dataclass(frozen=True, kw_only=True)
class Connections(Method):
    """Which weights the loss of an untrained network depends on."""

    kind: ClassVar[str] = "connections"

    @abstractmethod
    def kept(self, model: nn.Module, selection: Selection, sparsity: float, context: Context) -> dict[str, Tensor]:
        """Masks of what stays, of the weights' shapes; the model is left as it was."""
