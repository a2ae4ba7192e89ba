r"""Early stopping: the weights of the epoch that was best on val, and no more epochs than that takes.

Paper    Prechelt. Early Stopping - But When? Neural Networks: Tricks of the Trade, 1998.
Formula  r <- e where score_e is better than score_r by more than gain (r: first the first epoch);   stop after epoch e
         when e - r >= patience;   w <- w_best
Departs  Judges the task's metric on val, not a generalisation loss; the paper's criterion UP with strips of one epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from espalier.core.fields import INF, Range
from espalier.core.method import Method

Patience = Annotated[int, Range(1, INF, "epochs", "epochs in a row without a better score")]
Gain = Annotated[float, Range(0, INF, "of the metric", "what a better score must gain to renew the patience")]


@dataclass(frozen=True, kw_only=True)
class EarlyStopping(Method):
    """Restores the best epoch, however small its lead. ``patience`` ``None``: never stop early."""

    id: ClassVar[str] = "early-stopping"
    kind: ClassVar[str] = "stopping"
    patience: Patience | None = 5
    gain: Gain = 0.0

    @property
    def needs(self) -> frozenset[str]:
        """Data to decide on."""
        return frozenset({"val"})

    def exhausted(self, epoch: int, last: int) -> bool:
        """Whether ``epoch`` (from 1) is ``patience`` epochs past the ``last`` one that gained enough."""
        return self.patience is not None and epoch - last >= self.patience
