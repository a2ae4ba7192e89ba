"""What a method may do inside the training loop: the part type that crosses rooms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from espalier.core.context import Context


@dataclass
class Loop:
    """The running training loop as a callback sees it. ``step`` counts optimizer steps over all epochs, from 0."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    context: Context
    generator: torch.Generator
    epochs: int
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch


class Callback:
    """Every hook may be left out. ``model`` is the bare model, its forms attached."""

    def on_start(self, loop: Loop) -> None:
        """Before the first step (and again after a resume, once the state is restored)."""

    def on_epoch_start(self, loop: Loop) -> None:
        """Before the first batch of an epoch."""

    def around(self, loop: Loop) -> AbstractContextManager[object]:
        """What the model's forward on a training batch runs in; the loss and the backward pass come after it."""
        return nullcontext()

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        """The loss to minimise instead of ``loss``; the default hands it back."""
        return loss

    def before_step(self, loop: Loop) -> None:
        """Gradients are there, the optimizer has not stepped."""

    def after_step(self, loop: Loop) -> None:
        """The optimizer has stepped."""

    def on_epoch(self, loop: Loop) -> None:
        """After the last batch of an epoch, before it is validated and checkpointed."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data that a resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
