"""Schedules of the dropout rate, and where a model drops."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.method import Method

LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Dropping(NamedTuple):
    """A layer that drops, and the name of the attribute that holds the rate."""

    layer: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        """The rate in force."""
        return float(getattr(self.layer, self.attribute))


def dropouts(model: nn.Module) -> dict[str, Dropping]:
    """Path -> dropout layers, and attention and recurrent layers that drop."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            found[path] = Dropping(module, "p")
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0:
            found[path] = Dropping(module, "dropout")
    return found


@dataclass(frozen=True, kw_only=True)
class DropoutSchedule(Method):
    """What every dropout layer's rate is multiplied by as the training goes on; the rates are put back at its end."""

    kind: ClassVar[str] = "dropout-schedule"

    @abstractmethod
    def factor(self, progress: float) -> float:
        """The multiplier, 0 to 1, when the share ``progress`` of the steps is done."""

    @contextmanager
    def over(self, model: nn.Module, context: Context) -> Iterator[Callback]:
        """The callback that sets the rates of ``model``. Warns where nothing in it drops."""
        rates = {path: place.rate for path, place in dropouts(model).items()}
        if not any(rates.values()):
            context.warn(
                f"{self.name} has no rate to change: no layer of {type(model).__name__} drops anything. "
                "Put a train.dropout step before, or leave it out."
            )
        try:
            yield _Rates(self, rates)
        finally:
            _set(model, rates, 1.0)


class _Rates(Callback):
    def __init__(self, schedule: DropoutSchedule, rates: dict[str, float]) -> None:
        self.schedule, self.rates = schedule, rates

    def on_epoch_start(self, loop: Loop) -> None:
        self.set(loop, loop.step)

    def after_step(self, loop: Loop) -> None:
        self.set(loop, loop.step + 1)

    def set(self, loop: Loop, step: int) -> None:
        """Set the rates of ``step``."""
        _set(loop.model, self.rates, self.schedule.factor(min(1.0, step / loop.steps)))


def _set(model: nn.Module, rates: dict[str, float], factor: float) -> None:
    for path, place in dropouts(model).items():
        if path in rates:
            setattr(place.layer, place.attribute, rates[path] * factor)
