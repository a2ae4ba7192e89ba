"""The one training loop.

Callbacks see the bare model, the optimizer and a generator that is seeded afresh for every epoch; ``loss`` may replace
the loss, ``before_step`` the gradients (the last word before the optimizer), ``after_step`` the weights. Parameters are
collected when the loop starts: attach forms before, and change their buffers in place. State is kept after every epoch
by ``context.epochs(name)``; a run that finds one there goes on from it, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import DataError, RunError
from espalier.core.model import check_finite, device_of, keep_mode
from espalier.core.plan import Plan, applied
from espalier.core.task import Task, to_device
from espalier.train.adamw import AdamW
from espalier.train.augmentation import Augmentation, Augmented, augmented
from espalier.train.early_stopping import EarlyStopping
from espalier.train.ema import EMA, Average
from espalier.train.judge import Judge, Stopped
from espalier.train.optimizer import same_layout
from espalier.train.quantizers import QuantizerHooks
from espalier.train.randomness import seeded_epochs
from espalier.train.schedule import Constant, LearningRateSchedule
from espalier.train.state import pack, unpack
from espalier.train.watch import LossWatch

BatchLoss = Callable[[Any, Any], Tensor]
Precision = Literal["fp32", "bf16"]
REPORT_SECONDS = 0.2


@dataclass(frozen=True)
class FitResult:
    """``history``: one row per epoch (``epoch, loss, score, lr, seconds``; ``score`` is None without val data).

    ``best_epoch``: the epoch (from 1) whose weights were kept, None without early stopping. ``stopped``: what ended
    the training before its last epoch, ``""`` if nothing did.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: Stopped = ""


def fit(
    model: nn.Module,
    context: Context,
    *,
    epochs: int,
    loss: BatchLoss | None = None,
    callbacks: Sequence[Callback] = (),
    optimizer: torch.optim.Optimizer | None = None,
    schedule: LearningRateSchedule | None = None,
    augment: tuple[Augmentation, ...] = (),
    stopping: EarlyStopping | None = None,
    settled: int = 0,
    ema: EMA | None = None,
    clip: float | None = None,
    precision: Precision = "fp32",
    name: str = "fit",
) -> FitResult:
    """Train ``model`` in place on ``context.data.train`` and hand it back in the modes it came in, without gradients.

    ``loss(output, batch) -> scalar`` replaces the task's; ``schedule`` multiplies the optimizer's rates per step;
    epochs up to ``settled`` are no candidates for the best (a sparsity schedule still runs); with ``ema`` the averaged
    weights are scored and handed back; ``clip`` bounds the norm of all gradients; ``name`` tells this loop's state and
    seeds from those of other loops in the same step.

    Raises ``NumericError`` for a loss or weight that is NaN or infinite, ``DataError`` for a loader without batches,
    ``UsageError`` for a loss that is no scalar tensor or reaches no trainable parameter, ``RunError`` for a kept
    state of another training.
    """
    if not epochs:
        return FitResult()
    loader = context.data.data("train")
    if optimizer is None:
        optimizer = AdamW().over(model)
    original = context.models.get("original")
    original = None if original is model else original
    with ExitStack() as stack:
        stack.enter_context(keep_mode(model))
        if original is not None:
            stack.enter_context(keep_mode(original))
            original.eval()
        quantizers = stack.enter_context(QuantizerHooks(model))
        if quantizers:
            callbacks = (*callbacks, quantizers)
        average = Average(ema) if ema is not None else None
        if average is not None:  # the last: it follows what all others have made of a step
            callbacks = (*callbacks, average)
        begin = stack.enter_context(seeded_epochs(context, name, loader))
        begin(0)
        for part in augment:
            part.check(context.data)
        trainer = _Trainer(
            loop=Loop(model, optimizer, context, torch.Generator(), epochs, _count(loader)),
            judge=Judge(task=context.data, original=original, stopping=stopping, settled=settled),
            task=context.data, loader=loader, original=original, callbacks=callbacks, own_loss=loss,
            average=average, schedule=schedule or Constant(), augment=augment, clip=clip, precision=precision,
            name=name,
        )  # fmt: skip
        stack.callback(trainer.drop_gradients)
        return trainer.run(begin)


def _count(loader: Iterable[Any]) -> int:
    """Batches per epoch; a loader that does not know is counted once."""
    try:
        count = len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        count = sum(1 for _ in loader)
    if not count:
        raise DataError("the train loader gives no batch; training needs one (drop_last with a large batch_size?).")
    return count


@dataclass(kw_only=True)
class _Trainer:
    loop: Loop
    judge: Judge
    task: Task
    loader: Iterable[Any]
    original: nn.Module | None
    callbacks: Sequence[Callback]
    own_loss: BatchLoss | None
    average: Average | None
    schedule: LearningRateSchedule
    augment: tuple[Augmentation, ...]
    clip: float | None
    precision: Precision
    name: str
    parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = device_of(self.loop.model)
        for group in self.loop.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self, begin: Callable[[int], int]) -> FitResult:
        """Epoch after epoch, from the state kept if there is one."""
        loop, judge = self.loop, self.judge
        loop.model.train()
        self.restore()
        loop.generator.manual_seed(begin(loop.epoch))
        for callback in self.callbacks:
            callback.on_start(loop)
        grouped = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
        self.parameters = list({id(p): p for p in (*grouped, *loop.model.parameters()) if p.requires_grad}.values())
        while loop.epoch < loop.epochs and not judge.stopped:
            started = time.monotonic()
            loop.generator.manual_seed(begin(loop.epoch))
            loss = self.train_epoch()
            loop.epoch += 1
            with self.average.in_place(loop.model) if self.average is not None else nullcontext():
                score = judge.judge(loop)
            seconds = time.monotonic() - started
            judge.history.append(
                {"epoch": loop.epoch, "loss": loss, "score": score, "lr": self.rate(), "seconds": seconds}
            )
            self.save()
            self.report(loss=loss, **({} if score is None else {"score": score}))
        if judge.stopped == "time":
            loop.context.note(f"stopped after epoch {loop.epoch} of {loop.epochs}: the time is up.")
        if judge.best is not None and judge.best_epoch != loop.epoch:
            loop.model.load_state_dict(judge.best)
        elif self.average is not None:
            self.average.hand_over(loop.model)
        return FitResult(judge.history, judge.best_epoch, judge.stopped)

    def train_epoch(self) -> float:
        """One pass over the data; the mean loss."""
        loop, optimizer = self.loop, self.loop.optimizer
        around, on_loss, before, after = (
            self.hooks(hook) for hook in ("around", "loss", "before_step", "after_step")
        )  # fmt: skip
        precision: AbstractContextManager[Any] = nullcontext()
        if self.precision == "bf16":
            precision = torch.autocast(self.device.type, torch.bfloat16)
        for callback in self.callbacks:
            callback.on_epoch_start(loop)
        watch = LossWatch(loop, every_step=self.device.type == "cpu")
        told = time.monotonic()
        for batch in self.loader:
            batch = to_device(batch, self.device)
            changed = augmented(batch, self.augment) if self.augment else Augmented(batch)
            batch = changed.batch
            self.set_rates()
            with precision:
                with ExitStack() as stack:
                    for hook in around:
                        stack.enter_context(hook(loop))
                    output = self.task.predict(loop.model, batch)
                loss = self.batch_loss(output, batch)
                if changed.other is not None:
                    loss = changed.share * loss + (1 - changed.share) * self.batch_loss(output, changed.other)
                for hook in on_loss:
                    loss = hook(loop, batch, output, loss)
            watch.add(loss)
            self.drop_gradients()
            loss.backward()  # type: ignore[no-untyped-call]
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.clip)
            for hook in before:
                hook(loop)
            if before:
                same_layout(self.parameters)
            optimizer.step()
            for hook in after:
                hook(loop)
            loop.step += 1
            if time.monotonic() - told >= REPORT_SECONDS:
                told = time.monotonic()
                self.report(loss=watch.mean())
        mean = watch.mean()
        for callback in self.callbacks:
            callback.on_epoch(loop)
        check_finite(loop.model, f"after epoch {loop.epoch + 1} of {loop.epochs} (learning rate {self.rate():g})")
        return mean

    def hooks(self, name: str) -> list[Callable[..., Any]]:
        """The callbacks' methods called ``name``, without those that only inherit the empty one."""
        return [getattr(c, name) for c in self.callbacks if getattr(type(c), name) is not getattr(Callback, name)]

    def batch_loss(self, output: Any, batch: Any) -> Tensor:
        """The loss of one batch before the callbacks' say."""
        if self.own_loss is not None:
            return self.own_loss(output, batch)
        reference = None
        if self.task.loss is None and self.original is not None and self.task.target(batch) is None:
            with torch.no_grad():
                reference = self.task.predict(self.original, batch)
        return self.task.training_loss(output, batch, reference)

    def set_rates(self) -> None:
        """The learning rate of this step."""
        factor = self.schedule.factor(self.loop.step, self.loop.steps)
        for group in self.loop.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def rate(self) -> float:
        """The learning rate in force."""
        return float(self.loop.optimizer.param_groups[0]["lr"])

    def report(self, **values: float) -> None:
        """Tell how far the loop is, in optimizer steps."""
        loop = self.loop
        loop.context.progress("training", loop.step, loop.steps, epoch=loop.epoch, **values)

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def save(self) -> None:
        """Keep everything the next epoch depends on."""
        loop, store = self.loop, self.loop.context.epochs(self.name)
        if store is None:
            return
        tensors: dict[str, Tensor] = {}
        state = {
            "identity": self.identity(),
            "step": loop.step,
            "judge": self.judge.state_dict(),
            "plan": applied(loop.model).to_json(),
            "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }
        store.save(loop.epoch, tensors, pack(state, tensors))

    def restore(self) -> None:
        """Take up the state kept, if there is one."""
        loop, store = self.loop, self.loop.context.epochs(self.name)
        kept = store.load() if store is not None else None
        if kept is None:
            return
        loop.epoch, tensors, data = kept
        state = unpack(data, tensors)
        there, here = state["identity"], self.identity()
        different = [f"{key} {there[key]!r} there, {here[key]!r} here" for key in here if there[key] != here[key]]
        if different:
            raise RunError(
                f"the epochs kept for {loop.context.path or self.name!r} belong to another training "
                f"({'; '.join(different)}). Start in a new folder, or resume with the first run's recipe and data."
            )
        loop.step = state["step"]
        self.judge.load_state_dict(state["judge"])
        edits = Plan.from_json(state["plan"]).edits
        Plan(edits[len(applied(loop.model).edits) :]).apply(loop.model, loop.optimizer)
        loop.model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to be continued."""
        return {
            "epochs": self.loop.epochs,
            "steps_per_epoch": self.loop.steps_per_epoch,
            "optimizer": type(self.loop.optimizer).__name__,
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
        }
