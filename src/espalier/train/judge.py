"""Scores every epoch on val, remembers the best one and decides when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from espalier.core.callback import Loop
from espalier.core.metric import Agreement, Metric
from espalier.core.task import Task
from espalier.train.early_stopping import EarlyStopping
from espalier.train.state import snapshot

Stopped = Literal["", "patience", "time"]


@dataclass(kw_only=True)
class Judge:
    """``settled``: epochs up to this one are no candidates for the best and exhaust no patience.

    ``renewed_epoch``: the last one that was enough better than the one that renewed the patience before it.
    """

    task: Task
    original: nn.Module | None
    stopping: EarlyStopping | None
    settled: int
    best: dict[str, Any] | None = None
    best_epoch: int | None = None
    best_score: float = math.nan
    renewed_epoch: int | None = None
    renewed_score: float = math.nan
    stopped: Stopped = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    def metric(self) -> Metric | None:
        """What to score by; None where there is nothing to score on."""
        if self.stopping is not None:
            return self.task.scorer()
        if self.task.val is None:
            return None
        metric = self.task.scorer()
        return None if isinstance(metric, Agreement) and self.original is None else metric

    def judge(self, loop: Loop) -> float | None:
        """The score of the epoch just ended (``loop.epoch``, from 1), the best and the end decided on it."""
        metric = self.metric()
        score = None
        if metric is not None:
            score = self.task.measure(loop.model, "val", self.original).value
            self.decide(loop, metric, score)
        if not self.stopped and loop.epoch < loop.epochs and loop.context.out_of_time():
            self.stopped = "time"
        return score

    def decide(self, loop: Loop, metric: Metric, score: float) -> None:
        """Keep the weights if they are the best so far; give up when patience is exhausted."""
        if self.stopping is None or loop.epoch <= self.settled:
            return
        better = 1 if metric.higher_is_better else -1
        if self.best_epoch is None or better * (score - self.best_score) > 0:
            self.best, self.best_epoch, self.best_score = snapshot(loop.model.state_dict()), loop.epoch, score
        if self.renewed_epoch is None or better * (score - self.renewed_score) > self.stopping.gain:
            self.renewed_epoch, self.renewed_score = loop.epoch, score
        elif self.stopping.exhausted(loop.epoch, self.renewed_epoch):
            self.stopped = "patience"

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        names = ("best", "best_epoch", "best_score", "renewed_epoch", "renewed_score", "stopped", "history")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)
