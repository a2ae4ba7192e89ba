r"""One teacher.

Paper    Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. NIPS 2014 workshop. arXiv:1503.02531
Formula  teacher -> student
Departs  None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.distill.parts import Teacher, Teaching

if TYPE_CHECKING:
    from espalier.distill.distill import Distill


@dataclass(frozen=True, kw_only=True)
class Single(Teaching):
    """The step's teacher, nobody else."""

    id: ClassVar[str] = "single"

    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """One lesson."""
        return method.learn(student, teachers, context)
