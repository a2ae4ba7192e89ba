"""What one row of ``benchmarks/methods.py`` is, and what a reader needs to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import espalier.train as t
from espalier.core.method import Technique
from espalier.core.recipe import FileOptions
from espalier.core.task import Task


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: the method's full name, what is done, the steps, the network they start from."""

    id: str
    what: str
    steps: tuple[Technique, ...]
    network: str = "plain"
    file: FileOptions = field(default_factory=FileOptions)
    loss: Any = None  # in place of cross-entropy

    def task(self, task: Task) -> Task:
        """The task of this row."""
        from dataclasses import replace

        return task if self.loss is None else replace(task, loss=self.loss)


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row. ``every``: optimizer steps between two mask updates."""

    mode: str
    epochs: int
    images: int
    judged: int
    every: int

    @property
    def tune(self) -> t.Finetune:
        """The fine-tuning that follows a one-shot step."""
        return t.Finetune(epochs=self.epochs, lr=1e-3)

    @property
    def start(self) -> int:
        """Epochs of the network that all rows start from."""
        return 2 * self.epochs if self.mode == "full" else 6 * self.epochs

    @property
    def longer(self) -> int:
        """Epochs of a step that prunes while it trains: what a one-shot row has for fine-tuning, twice."""
        return 2 * self.epochs
