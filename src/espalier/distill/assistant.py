r"""Teacher assistants: networks of sizes in between, each taught by the one before, the last of them teaches.

Paper    Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh. Improved Knowledge Distillation via Teacher
         Assistant. AAAI 2020. arXiv:1902.03393
Formula  teacher -> assistant_1 -> ... -> student, each step an ordinary distillation
Departs  None. Direct distillation, which it is to be compared with, is a step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.model import copy_model, device_of
from espalier.distill.parts import Teacher, Teaching

if TYPE_CHECKING:
    from espalier.distill.distill import Distill


@dataclass(frozen=True, kw_only=True)
class Assistant(Teaching):
    """``between``: named models from large to small, each trained as it stands for the epochs of the step.

    One whose accuracy lies near the mean of teacher and student helps most, says the paper.
    """

    id: ClassVar[str] = "assistant"
    between: tuple[str, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """The assistants."""
        return super().needs | {f"model:{name}" for name in self.between}

    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """One lesson after the other."""
        if not self.between:
            context.warn(
                f"{self.name} names no assistant, so the teacher teaches the student itself: between=('name', ...)."
            )
        for number, name in enumerate(self.between, 1):
            pupil = copy_model(context.model(name)).to(device_of(student))
            method.learn(pupil, teachers, context, name=f"assistant-{number}")
            teachers = (Teacher.of(name, pupil, device_of(student)),)
        return method.learn(student, teachers, context)
