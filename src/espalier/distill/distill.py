r"""Distillation: a student learns from a teacher, from several, or from other students.

Paper    Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. NIPS 2014 workshop. arXiv:1503.02531
Formula  min hard * L_task + sum of the losses;   hard: what the losses leave, such as 1 - alpha beside soft targets
Departs  The teacher may be any named model; by default it is the untouched original, and the student what a step
         before has made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.fields import Epochs, Penalty
from espalier.core.metric import Agreement
from espalier.core.model import copy_model, device_of
from espalier.core.plan import rebase
from espalier.distill.lesson import Combine, prepare
from espalier.distill.outputs import ClassDim, Reading
from espalier.distill.parts import CURRENT, DistillLoss, OutputLoss, Teacher, Teaching
from espalier.distill.single import Single
from espalier.train import Training
from espalier.train.augmentation import Mixing


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Trains the model at hand, or a copy of the named ``student``, which is then the result.

    ``teacher``: a named model; ``current`` is the model at hand as it comes. ``losses``: empty for those of
    ``teaching`` (soft targets, where its paper has no others). ``hard``: weight of the task's own loss; None for what
    the losses leave of it. ``output``: the key of what is distilled where the model hands back a mapping.
    ``classes``: the dimension of the classes; auto takes the labels' shape, then the last of three, else the second.
    """

    id: ClassVar[str] = "distill"
    epochs: Epochs = 5
    teacher: str = "original"
    student: str | None = None
    losses: tuple[DistillLoss, ...] = ()
    hard: Penalty | None = None
    teaching: Teaching = field(default_factory=Single)
    output: str = ""
    classes: ClassDim = "auto"

    @property
    def needs(self) -> frozenset[str]:
        """What training needs, and the named models."""
        names = {self.student} | ({self.teacher} if self.teaching.taught else set())
        return super().needs | {f"model:{name}" for name in names - {None, CURRENT}}

    def conflicts(self) -> list[str]:
        """What the teaching does not go with, smoothed labels that nothing looks at, and labels that are blends."""
        found = super().conflicts() + self.teaching.problems(self)
        if any(isinstance(part, Mixing) for part in self.augment):
            single = [part.id for part in self.losses if isinstance(part, OutputLoss) and part.by_label]
            found += [f"augment blends labels, and {name} looks at one label for each row" for name in single]
        if self.smoothing is not None and not self.weighed()[1]:
            found.append("smoothing is of labels, and these losses leave nothing of the task's own: set hard above 0")
        return found

    def weighed(self) -> tuple[tuple[DistillLoss, ...], float]:
        """The losses of the main training, and the weight of the task's own beside them."""
        losses, hard = tuple(part for part in self.losses if not part.ahead), self.hard
        if not losses:
            losses, own = self.teaching.default
            hard = own if hard is None else hard
        return losses, math.prod(part.leaves for part in losses) if hard is None else hard

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """The student, taught."""
        student = model
        if self.student is not None:
            named = copy_model(context.model(self.student)).to(device_of(model))
            student = rebase(named, self.student)
        if not self.epochs:
            return student
        teachers = (self.hired(self.teacher, model, context),) if self.teaching.taught else ()
        return self.teaching.teach(self, student, teachers, context)

    def hired(self, name: str, model: nn.Module, context: Context) -> Teacher:
        """The named model as a teacher beside ``model``."""
        return Teacher.of(name, model if name == CURRENT else context.model(name), device_of(model))

    def learn(
        self,
        student: nn.Module,
        teachers: Sequence[Teacher],
        context: Context,
        *,
        combine: Combine | None = None,
        name: str = "fit",
    ) -> nn.Module:
        """Train ``student`` in place with frozen ``teachers``: losses that stand alone first, then the others."""
        self.compare(student, teachers, context)
        losses, hard = self.weighed()
        for number, part in enumerate((part for part in self.losses if part.ahead), 1):
            stage = self.replace(epochs=part.ahead, penalties=(), stopping=None, ema=None)
            lesson = prepare(stage, student, teachers, context, self.read(context), losses=(part,), hard=0.0)
            called = f"{name}-{part.id}" + (f"-{number}" if number > 1 else "")
            stage.train(student, context, callbacks=(lesson,), loss=nothing, name=called)
        if hard and self.hard is None and not self.labelled(context):
            context.note(f"{self.name}: the batches carry no labels, so the teacher alone says what is right.")
            hard = 0.0
        lesson = prepare(
            self, student, teachers, context, self.read(context), losses=losses, hard=hard, combine=combine
        )  # fmt: skip
        context.record.details["distillation"] = {"losses": [part.id for part in losses], "hard": hard}
        self.train(student, context, callbacks=(lesson,), loss=None if hard else nothing, name=name)
        return student

    def read(self, context: Context) -> Callable[[Any, Any], Reading]:
        """``(output, batch) ->`` how outputs become rows."""
        return lambda output, batch: Reading.of(output, batch, context.data, self.output, self.classes)

    def labelled(self, context: Context) -> bool:
        """Whether the task's own loss has something to go by besides the original's answers."""
        task = context.data
        with context.forked("labels"):
            batch = next(iter(task.data("train")), None)
        return task.loss not in (None, F.cross_entropy) or batch is None or task.target(batch) is not None

    def own_loss(self, context: Context, output: Any, batch: Any) -> Tensor:
        """The task's own loss, smoothed if asked."""
        if self.smoothing is not None:
            return self.smoothing.loss(context.data)(output, batch)
        return context.data.training_loss(output, batch)

    def compare(self, student: nn.Module, teachers: Sequence[Teacher], context: Context) -> None:
        """Measure the teachers and the student on val; one that is worse than the student is said.

        Agreement with the original, which stands in where there are no labels, is no measure of a teacher.
        """
        metric = context.data.scorer()
        if context.data.val is None or isinstance(metric, Agreement):
            return
        score = context.measure(student)
        told = {"student": score.value}
        for teacher in teachers:
            theirs = context.measure(teacher.model)
            told[teacher.name] = theirs.value
            if metric.drop(score, theirs) > math.hypot(score.stderr, theirs.stderr):
                context.warn(
                    f"{self.name}: the teacher {teacher.name!r} is worse than its student on val: {metric.name} "
                    f"{theirs} {metric.unit} against {score} {metric.unit}. Train it first, or name another one."
                )
        context.record.details.setdefault("before", []).append(told)


def nothing(*_: Any) -> Tensor:
    """In place of a task's loss that has no weight."""
    return torch.zeros(())
