r"""Deep mutual learning: students teach each other while they learn; there is no teacher.

Paper    Zhang, Xiang, Hospedales, Lu. Deep Mutual Learning. CVPR 2018. arXiv:1706.00384
Formula  L_k = CE(z_k, y) + 1 / (K - 1) sum_(l != k) KL(p_l || p_k),   p_l as given, at temperature 1
Departs  All students answer a batch once and then step together; the paper lets one step before the next answers. Of
         those built as the first one is, the best on val is returned; where penalties, ema, stopping, dropout or
         reestimate are set it is the first one, as they are for it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.fields import Count
from espalier.core.model import copy_model, device_of
from espalier.core.parametrize import plain, slots
from espalier.core.plan import rebase
from espalier.distill.fresh import afresh
from espalier.distill.learner import Learner
from espalier.distill.lesson import check_outputs, look, output_value
from espalier.distill.outputs import Reading
from espalier.distill.parts import DistillLoss, FeatureLoss, OutputLoss, Teacher, Teaching
from espalier.distill.soft_targets import SoftTargets
from espalier.train.augmentation import Mixing
from espalier.train.looking import batches, looking

if TYPE_CHECKING:
    from espalier.distill.distill import Distill

ALONE = ("penalties", "ema", "stopping", "dropout", "reestimate")
"""Fields of the step that are for its own student, and not for the others."""


@dataclass(frozen=True, kw_only=True)
class Mutual(Teaching):
    """``students``: named models that learn beside the step's; ``copies``: so many more, copies with fresh weights."""

    id: ClassVar[str] = "mutual"
    taught: ClassVar[bool] = False
    students: tuple[str, ...] = ()
    copies: Count = 1

    @property
    def needs(self) -> frozenset[str]:
        """Labels, and the students."""
        return super().needs | {"labels"} | {f"model:{name}" for name in self.students}

    @property
    def default(self) -> tuple[tuple[DistillLoss, ...], float | None]:
        """The other's probabilities as they are, beside all of the task's own loss."""
        return (SoftTargets(alpha=1.0, temperature=1.0),), 1.0

    def conflicts(self) -> list[str]:
        """It takes two."""
        return (
            [] if self.students or self.copies else ["one student cannot learn from itself: name students, or copies"]
        )

    def problems(self, method: Distill) -> list[str]:
        """What has no place here."""
        found = []
        if method.teacher != "original":
            found.append(f"teacher={method.teacher!r} has no say in mutual learning: name it among the students")
        if any(isinstance(part, Mixing) for part in method.augment):
            found.append("mutual learning gives every student the labels as they are, and augment blends them")
        names = [part.id for part in method.losses if isinstance(part, FeatureLoss)]
        if names:
            found.append(f"mutual learning compares outputs; {', '.join(names)} compares features")
        return found

    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """All learn together; the best is returned."""
        device = device_of(student)
        peers = [rebase(copy_model(context.model(name)).to(device), name) for name in self.students]
        peers += [afresh(plain(student), context, f"copy-{number}") for number in range(self.copies)]
        losses, hard = method.weighed()
        outputs = [part for part in losses if isinstance(part, OutputLoss)]
        with looking(student, context, grad=False):
            batch = next(iter(batches(student, context, 1, "first batch")))
            reading = method.read(context)(context.data.predict(student, batch), batch)
            answer, _ = look(student, context, batch, reading)
            for number, peer in enumerate(peers, 2):
                told, _ = look(peer, context, batch, reading)
                check_outputs(outputs, reading, answer, told, f"student {number}")
        together = Together(method, peers, outputs, hard, reading)
        method.train(student, context, callbacks=(together,))
        alone = [name for name in ALONE if getattr(method, name)]
        if alone:
            context.note(f"{self.name}: {', '.join(alone)} act on the step's own student alone, which is returned.")
            return student
        return self.best(student, peers, context)

    def best(self, student: nn.Module, peers: Sequence[nn.Module], context: Context) -> nn.Module:
        """The best on val of those that have the same parameters in the same forms as ``student``; it, without val."""
        built = structure(student)
        alike = [student, *(peer for peer in peers if structure(peer) == built)]
        if context.data.val is None or len(alike) == 1:
            return student
        higher = context.data.scorer().higher_is_better
        scores = [context.measure(model).value for model in alike]
        context.record.details["students"] = scores
        return alike[scores.index(max(scores) if higher else min(scores))]


def structure(model: nn.Module) -> list[tuple[str, torch.Size, str]]:
    """Names, shapes and phases of all parameters."""
    return [(name, slot.shape, slot.phase) for name, slot in slots(model).items()]


class Together(Callback):
    """The other students and their optimizers; the loss that is minimised is the sum over all students."""

    def __init__(
        self, method: Distill, peers: Sequence[nn.Module], losses: Sequence[OutputLoss], hard: float, reading: Reading
    ) -> None:
        self.method, self.losses, self.hard, self.reading = method, losses, hard, reading
        self.learners = [Learner(peer, method) for peer in peers]

    def on_start(self, loop: Loop) -> None:
        for learner in self.learners:
            learner.module.train()

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        task = loop.context.data
        answers = [output, *(task.predict(learner.module, batch) for learner in self.learners)]
        own = [loss, *(self.method.own_loss(loop.context, answer, batch) for answer in answers[1:])]
        rows = [self.reading.rows(answer).detach() for answer in answers]
        total = self.hard * torch.stack(own).sum()
        for k, answer in enumerate(answers):
            for other, said in enumerate(rows):
                if other != k:
                    value = output_value(
                        self.losses, self.reading, answer, said[None], task.target(batch), loop.epoch
                    )  # fmt: skip
                    total = total + value / (len(answers) - 1)
        return total

    def after_step(self, loop: Loop) -> None:
        for learner in self.learners:
            learner.step(loop)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): learner.state_dict() for number, learner in enumerate(self.learners)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, learner in enumerate(self.learners):
            learner.load_state_dict(state[str(number)])
