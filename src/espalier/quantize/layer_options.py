"""The widths each layer can have, and what they cost under a budget: what mixed bits choose among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from espalier.core.parametrize import Slot
from espalier.quantize.allocation import allocate
from espalier.quantize.input_trials import InputTrial
from espalier.quantize.places import Place
from espalier.quantize.trials import Trial

FLOAT_BITS = 32
KERNEL_BITS = 8
"""Of the integer kernels: fewer bits of a weight take the same time."""


@dataclass(frozen=True)
class Option:
    """One width a layer can have: as ``asked`` of the step, and tried with what the step's ends make of it.

    Neither for a layer that stays in fp32. ``inputs``: the width of its inputs, where that is chosen too.
    """

    asked: int | None
    trial: Trial | None
    inputs: InputTrial | None = None

    @property
    def bits(self) -> int:
        """Of the weight."""
        return FLOAT_BITS if self.trial is None else self.trial.bits

    @property
    def said(self) -> str:
        """Bits of the weight, or of the weight and its inputs: 4 or 4/8."""
        return str(self.bits) if self.inputs is None else f"{self.bits}/{self.inputs.bits}"


@dataclass(frozen=True)
class Layer:
    """A weight whose bits are to be chosen, and the widths there are."""

    place: Place
    options: tuple[Option, ...]

    @property
    def slot(self) -> Slot:
        """The weight."""
        return self.place.slot

    def coded_bytes(self, option: Option) -> int:
        """Length of the weight as coded; in fp32, 4 bytes a value."""
        return 4 * self.slot.shape.numel() if option.trial is None else option.trial.coded_bytes()

    def with_inputs(self, trials: Sequence[InputTrial]) -> Layer:
        """Every width of the weight with every one of its inputs."""
        return replace(self, options=tuple(replace(o, inputs=t) for o in self.options for t in trials or (None,)))


@dataclass(frozen=True)
class Budget:
    """What the options ``cost``, what all the rest takes (``rest``) and ``budget``, in a unit that is 1 / ``weigh``."""

    costs: Sequence[Sequence[float]]
    budget: float
    weigh: float = 1.0
    rest: float = 0.0

    def pick(self, values: Sequence[Sequence[float]]) -> list[int] | None:
        """The options with the least sum of ``values``; None where even the cheapest are above the budget."""
        return allocate(values, self.costs, self.budget - self.rest)

    def used(self, picked: Sequence[int]) -> float:
        """What a choice takes, in the user's unit."""
        return (self.rest + sum(cost[i] for cost, i in zip(self.costs, picked, strict=True))) / self.weigh

    @property
    def least(self) -> float:
        """What the cheapest options take, in the user's unit."""
        return (self.rest + sum(map(min, self.costs))) / self.weigh
