"""Watches the loss of an epoch: its mean, and the first value that is none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from espalier.core.callback import Loop
from espalier.core.errors import DataError, NumericError, UsageError


class LossWatch:
    """Sums the losses of an epoch and stops at the first that is not finite; off the CPU it looks when asked.

    Reading a loss waits for the accelerator, so there the losses are read in bulk.
    """

    def __init__(self, loop: Loop, *, every_step: bool) -> None:
        self.loop, self.every_step = loop, every_step
        self.total, self.count = 0.0, 0
        self.pending: list[Tensor] = []

    def add(self, loss: Any) -> None:
        """Take the loss of this step."""
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the loss must be a scalar tensor; got {got}. Reduce it: loss.mean() over the batch.")
        if not loss.requires_grad:
            raise UsageError(
                "the loss depends on no trainable parameter: it was detached, computed under no_grad, or everything it "
                "uses is frozen. Return a loss computed from the model's output."
            )
        self.pending.append(loss.detach())
        if self.every_step:
            self.read()

    def mean(self) -> float:
        """The mean loss so far. Raises ``DataError`` where no batch came."""
        self.read()
        if not self.count:
            raise DataError(
                "the train loader gave no batch in this epoch; it must give the same number in every epoch."
            )
        return self.total / self.count

    def read(self) -> None:
        """Count what is pending. Raises ``NumericError`` naming epoch, step and rate."""
        for value in torch.stack(self.pending).tolist() if len(self.pending) > 1 else map(float, self.pending):
            if not math.isfinite(value):
                self.stop(value)
            self.total += value
            self.count += 1
        self.pending.clear()

    def stop(self, value: float) -> None:
        """Say where the loss was lost."""
        loop = self.loop
        rate = loop.optimizer.param_groups[0]["lr"]
        where = f"{loop.context.path}: " if loop.context.path else ""
        raise NumericError(
            f"{where}the loss is {value} in epoch {loop.epoch + 1} of {loop.epochs}, step {self.count + 1} of "
            f"{loop.steps_per_epoch}, at learning rate {rate:g}. Lower lr (a tenth is a good first try), set clip=1, "
            "and check the batches for NaN."
        )
