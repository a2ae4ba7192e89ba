"""One lesson: a student learns from frozen teachers inside the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError, UsageError
from espalier.core.model import device_of
from espalier.data import Loader
from espalier.distill.learner import Learner
from espalier.distill.outputs import Reading
from espalier.distill.pairing import Pairing, pair_up
from espalier.distill.parts import DistillLoss, FeatureLoss, OutputLoss, Rows, Teacher
from espalier.distill.places import Place, Seen, caught, everywhere, seen
from espalier.train import Training
from espalier.train.looking import batches, looking

CACHED = 2**26
"""Teachers' outputs are kept for all batches of an epoch up to this many numbers."""

Combine = Callable[[Tensor, float | None, bool], Tensor]
"""(rows of all teachers (teachers, m, columns), temperature, whether they are classes) -> rows (m, columns)."""


@dataclass(kw_only=True)
class Lesson(Callback):
    """``hard`` times the task's own loss, and the ``losses``. Teachers and adapters are no part of the model."""

    losses: Sequence[DistillLoss]
    hard: float
    teachers: Sequence[Teacher]
    reading: Reading
    pairings: Sequence[Pairing]
    adapters: Learner | None
    combine: Combine | None = None
    repeated: bool = False
    features: dict[Place, Tensor] = field(default_factory=dict)
    cache: dict[int, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> list[OutputLoss]:
        """The losses over outputs."""
        return [part for part in self.losses if isinstance(part, OutputLoss)]

    @contextmanager
    def around(self, loop: Loop) -> Iterator[None]:
        """The student's features are kept."""
        places = dict.fromkeys(mine.place for pairing in self.pairings for mine, _ in pairing.pairs)
        with caught(loop.model, list(places)) as self.features:
            yield

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        """What the student is to make small."""
        total = self.hard * loss
        told = self.cache.get(loop.step % loop.steps_per_epoch)
        if told is None:
            rows = []
            for index, teacher in enumerate(self.teachers):
                heard, value = self.hear(index, teacher, loop, batch)
                total = total + value
                rows.append(heard)
            told = torch.stack(rows) if self.outputs else torch.empty(0)
            if self.repeated and not self.pairings and told.numel() * loop.steps_per_epoch <= CACHED:
                self.cache[loop.step % loop.steps_per_epoch] = told
        self.features = {}
        target = loop.context.data.target(batch)
        return total + output_value(self.outputs, self.reading, output, told, target, loop.epoch, self.combine)

    def hear(self, index: int, teacher: Teacher, loop: Loop, batch: Any) -> tuple[Tensor, Tensor | float]:
        """A teacher's rows, and the losses over its features."""
        pairings = [pairing for pairing in self.pairings if pairing.teacher == index]
        places = dict.fromkeys(theirs.place for pairing in pairings for _, theirs in pairing.pairs)
        with torch.no_grad(), caught(teacher.model, list(places)) as features:
            output = loop.context.data.predict(teacher.model, batch)
        value: Tensor | float = 0.0
        for pairing in pairings:
            value = value + teacher.share * pairing.value(self.features, features)
        return self.reading.rows(output) if self.outputs else torch.empty(0), value

    def after_step(self, loop: Loop) -> None:
        """The adapters step as well."""
        if self.adapters is not None:
            self.adapters.step(loop)

    def state_dict(self) -> dict[str, Any]:
        """The adapters and their optimizer."""
        return {} if self.adapters is None else self.adapters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        if self.adapters is not None:
            self.adapters.load_state_dict(state)


def output_value(
    losses: Sequence[OutputLoss],
    reading: Reading,
    output: Any,
    told: Tensor,
    target: Any,
    epoch: int,
    combine: Combine | None = None,
) -> Tensor | float:
    """The losses over the rows that count; ``told``: the rows of every teacher (teachers, m, columns)."""
    if not losses:
        return 0.0
    mine = reading.rows(output)
    labels, counts = reading.labels(target, len(mine))
    if labels is not None and counts is not None:
        if not bool(counts.any()):
            return mine.sum() * 0
        mine, told, labels = mine[counts], told[:, counts], labels[counts]
    terms = []
    for part in losses:
        theirs = told[0] if combine is None else combine(told, part.softness, reading.classes)
        terms.append(part.value(Rows(mine, theirs, labels, reading.classes, epoch)))
    return torch.stack(terms).sum()


def prepare(
    method: Training,
    student: nn.Module,
    teachers: Sequence[Teacher],
    context: Context,
    read: Callable[[Any, Any], Reading],
    *,
    losses: Sequence[DistillLoss],
    hard: float,
    combine: Combine | None = None,
) -> Lesson:
    """The lesson, after a look at one training batch: what does not fit is said before any training.

    ``read(output, batch)``: how outputs become rows.
    """
    with looking(student, context, grad=False):
        batch = next(iter(batches(student, context, 1, "first batch")))
        reading = read(context.data.predict(student, batch), batch)
        answer, mine = look(student, context, batch, reading)
        others = [look(teacher.model, context, batch, reading) for teacher in teachers]
    outputs = [part for part in losses if isinstance(part, OutputLoss)]
    for teacher, (told, _) in zip(teachers, others, strict=True):
        check_outputs(outputs, reading, answer, told, f"the teacher {teacher.name!r}")
    with context.forked("adapters"):
        pairings = [
            pair_up(part, index, (student, mine), (teacher.model, theirs))
            for part in losses if isinstance(part, FeatureLoss)
            for index, (teacher, (_, theirs)) in enumerate(zip(teachers, others, strict=True))
        ]  # fmt: skip
    for pairing in pairings:
        described = pairing.describe(teachers[pairing.teacher].name)
        context.record.details.setdefault("features", []).append(described)
    between = nn.ModuleList([pairing.adapters for pairing in pairings]).to(device_of(student))
    return Lesson(
        losses=losses, hard=hard, teachers=teachers, reading=reading, pairings=pairings,
        adapters=Learner(between, method) if any(True for _ in between.parameters()) else None, combine=combine,
        repeated=not method.augment and repeats(context.data.data("train")),
    )  # fmt: skip


def repeats(loader: Any) -> bool:
    """Whether every epoch brings the same batches in the same order."""
    return isinstance(loader, (list, tuple)) or (isinstance(loader, Loader) and not loader.shuffle)


def look(model: nn.Module, context: Context, batch: Any, reading: Reading) -> tuple[Tensor, list[Seen]]:
    """The output of ``model`` on ``batch``, and what was seen on the way."""
    with caught(model, everywhere(model), copied=False) as features:
        output = reading.tensor(context.data.predict(model, batch))
    return output, seen(model, features, output)


def check_outputs(losses: Sequence[OutputLoss], reading: Reading, mine: Tensor, theirs: Tensor, who: str) -> None:
    """Raise where ``losses`` cannot compare the two outputs.

    ``UsageError`` for a loss that needs classes, ``ModelError`` for different shapes, ``NumericError`` for NaN.
    """
    for part in losses:
        if part.classes_only and not reading.classes:
            raise UsageError(
                f"{part.name} compares probabilities of classes, and this output {tuple(mine.shape)} with its labels "
                "is no choice of one class: use the loss logits, which is a regression on the teacher's outputs."
            )
    if not losses:
        return
    if mine.shape != theirs.shape:
        raise ModelError(
            f"the student hands back {tuple(mine.shape)} and {who} {tuple(theirs.shape)} on the same batch; "
            f"{losses[0].name} compares them entry by entry. Name a model with the same outputs, or use losses over "
            "features alone: features, hints, attention, relational."
        )
    if not bool(theirs.isfinite().all()):
        raise NumericError(f"the output of {who} holds NaN or infinity on the first training batch.")
