"""Metric: an accumulating measure of "good", with direction, unit and standard error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espalier.core.errors import DataError, ModelError, NumericError, UsageError


@dataclass(frozen=True)
class Score:
    """A measured metric: value and standard error in the metric's unit, and the number of samples."""

    value: float
    stderr: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}"


class Metric(ABC):
    """A mean over samples. Subclasses give ``per_sample``; accumulation and the standard error are here.

    ``name``, ``unit`` and ``higher_is_better`` are plain attributes; drops are counted in ``unit``.
    """

    name: str = "metric"
    unit: str = ""
    higher_is_better: bool = True

    @abstractmethod
    def per_sample(self, output: Any, target: Any) -> Tensor:
        """Values ``(n,)`` for one batch, in the metric's unit."""

    def fresh(self) -> Accumulator:
        """A new accumulator."""
        return Accumulator(self)

    def drop(self, before: Score, after: Score) -> float:
        """How much worse ``after`` is, in the metric's unit (negative: better)."""
        change = before.value - after.value
        return change if self.higher_is_better else -change


class Accumulator:
    """Sums per-sample values in float64."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def update(self, output: Any, target: Any) -> None:
        """Add a batch. Raises ``UsageError`` where no per-sample tensor comes back, ``NumericError`` for NaN."""
        values = self.metric.per_sample(output, target)
        if not isinstance(values, Tensor) or values.ndim != 1:
            got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise UsageError(
                f"metric {self.metric.name!r} returned {got}; "
                "it must return one value per sample: a tensor of shape (n,)."
            )
        values = values.detach().double()
        if not bool(torch.isfinite(values).all()):
            raise NumericError(f"metric {self.metric.name!r} is NaN or infinite; check the model's outputs.")
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float((values * values).sum())

    def score(self) -> Score:
        """Mean and its standard error. Raises ``DataError`` when nothing was measured."""
        if not self.count:
            raise DataError("the loader gave no batch to measure; give a re-iterable loader with at least one batch.")
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean * mean)
        return Score(mean, math.sqrt(variance / max(1, self.count - 1)), self.count)


OTHER_METRIC = (
    "or give another metric: Task(metric=espalier.tasks.Loss(function)), or one of your own, a subclass of "
    "espalier.Metric."
)


def check_classes(output: Any, target: Any, who: str = "accuracy", other: str = OTHER_METRIC) -> None:
    """Raise unless ``output`` is ``(n, classes, ...)`` and ``target`` ``(n, ...)``: what can be compared.

    ``ModelError`` where the output cannot be right, ``DataError`` where the labels do not go with it. ``who`` compares,
    ``other`` says what could do so instead.
    """
    asked = f"{who} needs logits (n, classes, ...) and labels (n, ...) of class indices; "
    if not isinstance(output, Tensor) or output.ndim < 2:
        came = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{asked}the model gave {came}. Give Task(predict=...) that returns such logits alone, {other}"
        )
    if not isinstance(target, Tensor):
        raise DataError(
            f"{asked}the labels came as {type(target).__name__}. Give Task(target=...) that returns a tensor, {other}"
        )
    if target.shape == output.shape[:1] + output.shape[2:]:
        return
    came = f"{asked}got outputs {tuple(output.shape)} and labels {tuple(target.shape)}. "
    if output.ndim > 2 and target.shape == output.shape[:-1]:
        raise ModelError(
            f"{came}The classes stand last here: give Task(predict=lambda model, batch: "
            f"model(*batch[:-1]).movedim(-1, 1)), {other}"
        )
    raise DataError(f"{came}Give Task(target=...) that returns class indices of that shape, {other}")


class Accuracy(Metric):
    """Top-k accuracy in percent. ``output``: logits ``(n, classes, ...)``; ``target``: class indices."""

    unit = "%"

    def __init__(self, k: int = 1) -> None:
        self.k = k
        self.name = "accuracy" if k == 1 else f"top-{k} accuracy"

    def per_sample(self, output: Any, target: Any) -> Tensor:
        check_classes(output, target)
        top = output.topk(min(self.k, output.shape[1]), dim=1).indices
        hit: Tensor = (top == target.unsqueeze(1)).any(dim=1).double() * 100
        return hit.reshape(hit.shape[0], -1).mean(dim=1)


class Agreement(Metric):
    """Agreement with the original model's answer in percent: the metric where there are no labels.

    ``output``/``target``: this model's and the original's logits ``(n, classes, ...)``; outputs without a class
    axis of at least two agree as far as ``1 - ||a - b||^2 / ||b||^2`` goes, floored at 0.
    """

    name = "agreement"
    unit = "%"

    def per_sample(self, output: Any, target: Any) -> Tensor:
        ours, theirs = first_tensor(output), first_tensor(target)
        if ours.ndim >= 2 and ours.shape[1] >= 2:
            same = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double()
            return same.reshape(same.shape[0], -1).mean(dim=1) * 100
        error = (ours - theirs).double().reshape(ours.shape[0], -1).square().sum(dim=1)
        power = theirs.double().reshape(ours.shape[0], -1).square().sum(dim=1).clamp_min(1e-30)
        return (1 - error / power).clamp_min(0) * 100


class Loss(Metric):
    """A loss as the metric (lower is better): ``function(output, target)`` with one value per batch or per sample."""

    higher_is_better = False

    def __init__(self, function: Callable[[Any, Any], Tensor], name: str = "loss") -> None:
        self.function = function
        self.name = name

    def per_sample(self, output: Any, target: Any) -> Tensor:
        value = self.function(output, target)
        if isinstance(value, Tensor) and value.ndim == 0:
            return value.expand(first_tensor(output).shape[0])
        return value


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a nested output (tensor, tuple, list, dict, dataclass-like mapping)."""
    if isinstance(output, Tensor):
        return output
    for item in output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ():
        return first_tensor(item)
    raise UsageError(f"the model's output holds no tensor: {type(output).__name__}.")
