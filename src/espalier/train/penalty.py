"""Penalties on the effective weights, added to the loss of every batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from espalier.core.callback import Callback, Loop
from espalier.core.fields import Penalty
from espalier.core.method import Method
from espalier.core.parametrize import Slot, slots


@dataclass(frozen=True, kw_only=True)
class WeightPenalty(Method):
    """A cost per weight. Biases and norm layers (tensors of less than two dimensions) are left alone."""

    kind: ClassVar[str] = "penalty"
    strength: Penalty = 1e-4

    @abstractmethod
    def size(self, weight: Tensor) -> Tensor:
        """What ``weight`` (any shape) costs before ``strength``: a scalar."""


class Penalties(Callback):
    """Adds ``sum_p strength_p * sum_w size_p(w)`` over the trainable effective weights: masked ones count as zero."""

    def __init__(self, penalties: tuple[WeightPenalty, ...]) -> None:
        self.penalties = penalties
        self.weights: list[Slot] = []

    def on_epoch_start(self, loop: Loop) -> None:
        """Look the weights up: another callback may have changed their form."""
        self.weights = [s for s in slots(loop.model).values() if s.latent.requires_grad and len(s.shape) >= 2]

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        """The loss with the penalties added."""
        values = [slot.latent if slot.form is None else slot.form(slot.latent) for slot in self.weights]
        if not values:
            return loss
        for penalty in self.penalties:
            loss = loss + penalty.strength * torch.stack([penalty.size(value.float()) for value in values]).sum()
        return loss
