"""Penalties on the effective weights of every batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.fields import Penalty
from espalier.core.method import Method
from espalier.core.parametrize import Slot, slots
from espalier.train.proximal import step_sizes


@dataclass(frozen=True, kw_only=True)
class WeightPenalty(Method):
    """A cost per weight. Biases (tensors of less than two dimensions) and norm layers are left alone."""

    kind: ClassVar[str] = "penalty"
    strength: Penalty = 1e-4

    @abstractmethod
    def size(self, weight: Tensor) -> Tensor:
        """What ``weight`` (any shape) costs before ``strength``: a scalar."""

    def proximal(self, weight: Tensor, step: Tensor | float) -> Tensor | None:
        """``argmin_u |u - weight|^2 / (2 step) + strength size(u)``; None where the gradient of the cost is enough.

        ``step``: a number, or one for each weight.
        """
        return None


class Penalties(Callback):
    """Adds ``sum_p strength_p * sum_w size_p(w)`` over the trainable effective weights: masked ones count as zero.

    A penalty with a proximal map acts after the optimizer's step instead, on weights that are free to be zero: those
    without a form, and masked ones.
    """

    def __init__(self, penalties: tuple[WeightPenalty, ...]) -> None:
        self.penalties = penalties
        self.proximal = [p for p in penalties if type(p).proximal is not WeightPenalty.proximal]
        self.weights: list[Slot] = []

    def on_epoch_start(self, loop: Loop) -> None:
        """Look the weights up: another callback may have changed their form."""
        self.weights = [
            slot for slot in slots(loop.model).values()
            if slot.latent.requires_grad and len(slot.shape) >= 2
            and not all(isinstance(owner, (nn.LayerNorm, nn.RMSNorm)) for _, owner, _ in slot.owners)
        ]  # fmt: skip

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        """The loss with the penalties added."""
        for penalty in self.penalties:
            charged = [s for s in self.weights if penalty not in self.proximal or s.phase == "codes"]
            costs = [penalty.size(_effective(slot).float()) for slot in charged]
            loss = loss + penalty.strength * torch.stack(costs).sum() if costs else loss
        return loss

    def after_step(self, loop: Loop) -> None:
        """The proximal steps."""
        with torch.no_grad():
            for slot in self.weights:
                for penalty in self.proximal if slot.phase != "codes" else ():
                    moved = penalty.proximal(slot.latent, step_sizes(loop.optimizer, slot.latent))
                    assert moved is not None  # noqa: S101 - those that have one
                    slot.latent.copy_(moved)


def _effective(slot: Slot) -> Tensor:
    value: Tensor = slot.latent if slot.form is None else slot.form(slot.latent)
    return value
