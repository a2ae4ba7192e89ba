"""Small students and teachers, and a short way to run a distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.task import Task
from espalier.distill import Distill


def fixed(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(width: int = 4, *, seed: int = 0, size: int = 3) -> nn.Module:
    """Convolution, norm, ReLU, classifier on 6 x 6 images of one channel."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, size, padding=size // 2 - 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 16, 3),
    )  # fmt: skip


def learn(student: nn.Module, task: Task, teacher: nn.Module | None = None, **fields: Any) -> nn.Module:
    """``student`` after ``distill.distill`` with the named model ``teacher``, or with the original."""
    models = {} if teacher is None else {"teacher": teacher}
    fields = {"epochs": 1, **({} if teacher is None else {"teacher": "teacher"}), **fields}
    return Distill(**fields)(student, Context(task=task, models=models))
