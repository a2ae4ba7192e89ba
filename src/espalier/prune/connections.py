"""What ``prune.loss-prune`` ranks by: a score of every weight of an untrained network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.core.selection import Selection
from espalier.prune.parts import Scores
from espalier.prune.scopes import Global


def lowest_removed(scores: Scores, sparsity: float) -> dict[str, Tensor]:
    """Masks of what stays: all but the ``floor(sparsity * n)`` lowest over all layers; one weight of each stays."""
    return {name: ~gone for name, gone in Global().removed(scores, sparsity).items()}


@contextmanager
def normalising(model: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's own statistics, as in training; theirs, empty in a fresh network, are put back."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = [norm.training for norm in norms]
    before: list[dict[str, Any]] = [{k: v.clone() for k, v in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        with torch.no_grad():
            for norm, mode, buffers in zip(norms, modes, before, strict=True):
                norm.training = mode
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(buffers[name])


@dataclass(frozen=True, kw_only=True)
class Connections(Method):
    """Which weights the loss of an untrained network depends on."""

    kind: ClassVar[str] = "connections"

    @abstractmethod
    def kept(self, model: nn.Module, selection: Selection, sparsity: float, context: Context) -> dict[str, Tensor]:
        """Masks of what stays, of the weights' shapes; the model is left as it was."""
