"""The parts of a distillation: losses over outputs, losses over features, and who teaches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.core.model import copy_model
from espalier.distill.places import Pair, Seen, matched

if TYPE_CHECKING:
    from espalier.distill.distill import Distill

CURRENT = "current"
"""The name of the model that the step is given, as a teacher."""


@dataclass(frozen=True)
class Teacher:
    """A model that no training moves, and its name. ``share``: its part of the losses over features."""

    name: str
    model: nn.Module
    share: float = 1.0

    @classmethod
    def of(cls, name: str, model: nn.Module, device: torch.device) -> Teacher:
        """A frozen copy in eval mode; the model itself stays as it is."""
        return cls(name, copy_model(model).to(device).eval().requires_grad_(requires_grad=False))


@dataclass(frozen=True)
class Rows:
    """Outputs as rows: ``student``, ``teacher`` (m, classes) float32, ``labels`` (m,) or None; ``epoch`` from 0.

    ``classes``: whether the columns are logits of classes, rather than numbers to be regressed.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None = None
    classes: bool = True
    epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class DistillLoss(Method):
    """What the student is asked to take over from its teacher."""

    kind: ClassVar[str] = "distillation loss"

    @property
    def leaves(self) -> float:
        """What is left of the task's own loss beside this one, unless ``Distill.hard`` says it."""
        return 1.0

    @property
    def ahead(self) -> int:
        """Epochs in which this loss stands alone, before those of all others; 0: it is one of the others."""
        return 0


@dataclass(frozen=True, kw_only=True)
class OutputLoss(DistillLoss):
    """A loss over outputs, row by row."""

    classes_only: ClassVar[bool] = True
    """Whether it makes sense for logits of classes alone."""
    by_label: ClassVar[bool] = False
    """Whether it looks at the label of each row."""

    @abstractmethod
    def value(self, rows: Rows) -> Tensor:
        """The weighted loss: a scalar, a mean over the rows."""

    @property
    def softness(self) -> float | None:
        """The temperature at which the outputs of several teachers are averaged; None: the outputs themselves are."""
        return None


@dataclass(frozen=True, kw_only=True)
class FeatureLoss(DistillLoss):
    """A loss over pairs of features; ``layers``: paths of modules, the same in both networks, or student -> teacher.

    Without ``layers`` pairs are found by the shapes of what the modules hand back.
    """

    layers: tuple[str, ...] | dict[str, str] = ()
    aligned: ClassVar[bool] = True
    """Whether both sides come as (n, channels, ...) with equal sizes, the larger one averaged; else as they are."""
    per_channel: ClassVar[bool] = True
    """Whether channels are compared one by one."""

    @property
    def adapts(self) -> Literal["always", "where-needed", "never"]:
        """Where a linear map stands between the student's channels and the teacher's."""
        return "never"

    @abstractmethod
    def value(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The weighted loss of ``(student, teacher)`` features: a scalar, a mean over the samples."""

    def found(self, student: Sequence[Seen], teacher: Sequence[Seen]) -> list[Pair]:
        """The pairs to compare where no ``layers`` are given; empty where there is none."""
        return matched(student, teacher)


@dataclass(frozen=True, kw_only=True)
class Teaching(Method):
    """Who teaches whom."""

    kind: ClassVar[str] = "teaching"
    taught: ClassVar[bool] = True
    """Whether there is a teacher."""

    @property
    def default(self) -> tuple[tuple[DistillLoss, ...], float | None]:
        """The losses of its paper, and the weight of the task's own loss beside them (None: what the losses leave)."""
        from espalier.distill.soft_targets import SoftTargets

        return (SoftTargets(),), None

    def problems(self, method: Distill) -> list[str]:
        """Sentences about fields of the step that do not go with it."""
        return []

    @abstractmethod
    def teach(self, method: Distill, student: nn.Module, teachers: tuple[Teacher, ...], context: Context) -> nn.Module:
        """Train ``student`` and return the result; ``teachers``: the step's own, or none where nobody is ``taught``."""
