r"""Born-again networks: a student built as its teacher is, generation after generation.

Paper    Furlanello, Lipton, Tschannen, Itti, Anandkumar. Born Again Neural Networks. ICML 2018. arXiv:1805.04770
Formula  student_k = argmin KL(p_(k-1) || p_k) from fresh weights,   p_0: the teacher;   hard=1 adds CE(y, p_k)
Departs  The last generation is returned, without the ensemble of all. Weights may also begin as copies, which is how a
         network that earlier steps have changed can be its own teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import PhaseError
from espalier.core.fields import Generations
from espalier.core.model import copy_model, device_of
from espalier.core.parametrize import slots
from espalier.distill.fresh import afresh
from espalier.distill.parts import DistillLoss, Teacher, Teaching
from espalier.distill.soft_targets import SoftTargets

if TYPE_CHECKING:
    from espalier.distill.distill import Distill


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Teaching):
    """``start``: every generation begins with fresh weights, or with those of the student as it came."""

    id: ClassVar[str] = "self-distillation"
    generations: Generations = 1
    start: Literal["fresh", "copied"] = "fresh"

    @property
    def default(self) -> tuple[tuple[DistillLoss, ...], float | None]:
        """The teacher's probabilities as they are, no labels."""
        return (SoftTargets(alpha=1.0, temperature=1.0),), None

    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """Generation after generation."""
        born = student
        if self.start == "fresh":
            for slot in slots(student).values():
                if slot.form is not None:
                    raise PhaseError(
                        f"{self.name} would give {slot.name} fresh values, and an earlier step has fixed what it may "
                        "be. Put this step before that one, or begin with copies: start=copied."
                    )
        for number in range(1, self.generations + 1):
            born = copy_model(student)
            if self.start == "fresh":
                afresh(born, context, f"generation-{number}")
            method.learn(born, teachers, context, name=f"generation-{number}")
            teachers = (Teacher.of(f"generation {number}", born, device_of(student)),)
        return born
