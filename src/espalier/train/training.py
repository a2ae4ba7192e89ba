"""The fields that every technique that trains has, written once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.fields import Epochs, LearningRate, Positive
from espalier.core.method import Technique
from espalier.train.adamw import AdamW
from espalier.train.augmentation import Augmentation, Mixing
from espalier.train.batch_norm import reestimate
from espalier.train.cosine import Cosine
from espalier.train.dropout_schedule import DropoutSchedule
from espalier.train.early_stopping import EarlyStopping
from espalier.train.ema import EMA
from espalier.train.label_smoothing import LabelSmoothing
from espalier.train.loop import BatchLoss, FitResult, fit
from espalier.train.optimizer import LEARNING_RATE, Optimizer
from espalier.train.penalty import Penalties, WeightPenalty
from espalier.train.schedule import LearningRateSchedule


@dataclass(frozen=True, kw_only=True)
class Training(Technique):
    """A technique with ``epochs``: subclasses call :meth:`train` from ``transform``."""

    epochs: Epochs = 1
    lr: LearningRate = LEARNING_RATE
    optimizer: Optimizer = field(default_factory=AdamW)
    lr_schedule: LearningRateSchedule = field(default_factory=Cosine)
    penalties: tuple[WeightPenalty, ...] = ()
    smoothing: LabelSmoothing | None = None
    augment: tuple[Augmentation, ...] = ()
    dropout: DropoutSchedule | None = None
    stopping: EarlyStopping | None = None
    ema: EMA | None = None
    clip: Positive | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    reestimate: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Training data (and what the parts need) where there is anything to train."""
        if self.epochs:
            return super().needs | {"train"}
        idle = (self.smoothing, self.stopping, *self.augment)
        return frozenset().union(*(part.needs for part in self.parts() if part not in idle))

    def conflicts(self) -> list[str]:
        """Labels are blended once."""
        mixing = [part.id for part in self.augment if isinstance(part, Mixing)]
        return [f"augment blends labels once; got {', '.join(mixing)}"] if len(mixing) > 1 else []

    def train(
        self,
        model: nn.Module,
        context: Context,
        *,
        callbacks: Sequence[Callback] = (),
        loss: BatchLoss | None = None,
        settled: int = 0,
        name: str = "fit",
    ) -> FitResult:
        """Train ``model`` in place as the fields say; arguments as in :func:`espalier.train.fit`.

        ``loss`` takes the place of the task's and of ``smoothing``. BN statistics are re-estimated at the end if asked.
        """
        if not self.epochs:
            return FitResult()
        if loss is None and self.smoothing is not None:
            loss = self.smoothing.loss(context.data)
        own: tuple[Callback, ...] = (Penalties(self.penalties),) if self.penalties else ()
        with ExitStack() as stack:
            if self.dropout is not None:
                own = (*own, stack.enter_context(self.dropout.over(model, context)))
            if self.precision == "bf16":  # convolutions in bf16 are fastest with the channels last
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                stack.callback(model.to, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
            result = fit(
                model, context, epochs=self.epochs, loss=loss, callbacks=(*callbacks, *own),
                optimizer=self.optimizer.over(model, self.lr), schedule=self.lr_schedule, augment=self.augment,
                stopping=self.stopping, settled=settled, ema=self.ema, clip=self.clip, precision=self.precision,
                name=name,
            )  # fmt: skip
        context.record.details.setdefault("history", []).extend(result.history)
        if self.reestimate:
            reestimate(model, context)
        return result
