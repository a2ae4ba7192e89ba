"""The rule of ``prune.dropout``: which noise, and what goes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.core.selection import Selection
from espalier.prune.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class DropoutRule(Method):
    """A noise on weights that tells which of them can go."""

    kind: ClassVar[str] = "dropout-rule"

    @property
    def outputs(self) -> bool:
        """Whether whole output units go: then the model's outputs are left alone."""
        return False

    @abstractmethod
    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        """The running rule, its forms attached."""
