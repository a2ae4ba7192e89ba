r"""Early stopping: the weights of the epoch that was best on val, and no more epochs than that takes.

Paper    Prechelt. Early Stopping - But When? Neural Networks: Tricks of the Trade, 1998.
Formula  stop after epoch e when the last patience scores are all no better than the best before them;   w <- w_best
Departs  Judges the task's metric on val, not a generalisation loss; the paper's criterion UP with strips of one epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from espalier.core.fields import INF, Range
from espalier.core.method import Method

Patience = Annotated[int, Range(1, INF, "epochs", "epochs in a row without a better score")]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Method):
    """Restores the best epoch. ``patience`` ``None``: never stop early, only restore the best."""

    id: ClassVar[str] = "early-stopping"
    kind: ClassVar[str] = "stopping"
    patience: Patience | None = 5

    @property
    def needs(self) -> frozenset[str]:
        """Data to decide on."""
        return frozenset({"val"})

    def exhausted(self, epoch: int, best_epoch: int) -> bool:
        """Whether ``epoch`` (from 1) is ``patience`` epochs past the best one."""
        return self.patience is not None and epoch - best_epoch >= self.patience
