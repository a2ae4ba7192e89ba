"""How a network's outputs become rows: which tensor, which dimension holds the classes, which rows count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import UnknownNameError, did_you_mean
from espalier.core.metric import first_tensor
from espalier.core.task import Task

ClassDim = Literal["auto", "first", "last"]
IGNORED = -100
"""The label that torch's losses leave out."""


@dataclass(frozen=True)
class Reading:
    """``key``: of a mapping, else the first tensor; ``dim``: of the columns; ``classes``: whether these are classes.

    ``ignored``: the label of rows that do not count.
    """

    key: str
    dim: int
    classes: bool
    ignored: int = IGNORED

    @classmethod
    def of(cls, output: Any, batch: Any, task: Task, key: str, dim: ClassDim) -> Reading:
        """What one output and its batch show. Raises ``UnknownNameError`` for a key that the output lacks."""
        tensor, target = picked(output, key), task.target(batch)
        column = class_dim(tensor, target, dim)
        bound = task.loss.keywords if isinstance(task.loss, partial) else {}
        given = bound.get("ignore_index", getattr(task.loss, "ignore_index", IGNORED))
        ignored = given if isinstance(given, int) else IGNORED
        return cls(key, column, are_classes(tensor, target, task, column), ignored)

    def tensor(self, output: Any) -> Tensor:
        """The tensor that is distilled."""
        return picked(output, self.key)

    def rows(self, output: Any) -> Tensor:
        """(m, columns) in float32."""
        tensor = self.tensor(output)
        if tensor.ndim < 2:
            return tensor.reshape(-1, 1).float()
        return tensor.movedim(self.dim, -1).reshape(-1, tensor.shape[self.dim]).float()

    def labels(self, target: Any, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Class indices (m,) where ``target`` holds one for each row, and the rows that count (None: all of them)."""
        if not self.classes or not isinstance(target, Tensor) or target.numel() != rows or target.is_floating_point():
            return None, None
        flat = target.reshape(-1).long()
        counts = flat != self.ignored
        return flat, None if bool(counts.all()) else counts


def picked(output: Any, key: str) -> Tensor:
    """The tensor called ``key``, or the first one where none is named."""
    if not key:
        return first_tensor(output)
    names = list(output) if isinstance(output, Mapping) else []
    if key not in names:
        hint = did_you_mean(key, map(str, names)) if names else f" It is a {type(output).__name__}."
        raise UnknownNameError(f"distill.distill: the model's output has no part {key!r}.{hint}")
    return first_tensor(output[key])


def class_dim(output: Tensor, target: Any, dim: ClassDim) -> int:
    """Where the classes stand: where labels of that shape say so, else last of three dimensions, else second."""
    if output.ndim < 2 or dim == "last":
        return output.ndim - 1
    if dim == "first":
        return 1
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.shape == output.shape[:1] + output.shape[2:]:
            return 1
        if target.shape == output.shape[:-1]:
            return output.ndim - 1
    return 2 if output.ndim == 3 else 1


def are_classes(output: Tensor, target: Any, task: Task, dim: int) -> bool:
    """Whether the columns are logits of exclusive classes: more than one, and labels that can be indices of them.

    Floating-point labels are probabilities of classes only under cross-entropy.
    """
    if output.ndim < 2 or output.shape[dim] < 2:
        return False
    if not isinstance(target, Tensor):
        return True
    if target.is_floating_point():
        entropy = task.loss in (None, F.cross_entropy) or isinstance(task.loss, nn.CrossEntropyLoss)
        return entropy and target.shape == output.shape
    return target.shape != output.shape
