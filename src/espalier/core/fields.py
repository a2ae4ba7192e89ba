"""The one vocabulary of hyper-parameters: ``Annotated`` aliases that carry unit and range.

Checks, command-line help, recipe files, report rows and method pages read these; no second home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Allowed values ``low <= x <= high``, with unit and meaning. ``above``, ``below``: strictly, on that side."""

    low: float
    high: float
    unit: str
    about: str
    above: bool = False
    below: bool = False

    def allows(self, value: float) -> bool:
        """Whether ``value`` (a number) lies in the range; NaN never does."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        high = "" if self.high == float("inf") else f" to {'below ' if self.below else ''}{self.high:g}"
        return f"{'above ' if self.above else ''}{self.low:g}{high}" + ("" if high or self.above else " or more")


INF = float("inf")

Sparsity = Annotated[float, Range(0, 1, "fraction", "fraction of the weights removed", below=True)]
Bits = Annotated[int, Range(1, 16, "bits", "bits per weight")]
Epochs = Annotated[int, Range(0, 100_000, "epochs", "passes over the training data")]
Steps = Annotated[int, Range(1, INF, "steps", "optimizer steps")]
LearningRate = Annotated[float, Range(0, INF, "per step", "learning rate", above=True)]
Momentum = Annotated[float, Range(0, 1, "fraction", "momentum of SGD")]
Penalty = Annotated[float, Range(0, INF, "per unit", "strength of a penalty in the loss")]
Fraction = Annotated[float, Range(0, 1, "fraction", "a share of the whole")]
Positive = Annotated[float, Range(0, INF, "", "a positive number", above=True)]
Pixels = Annotated[int, Range(0, 4096, "pixels", "a distance in the image")]
Rounds = Annotated[int, Range(1, 10_000, "rounds", "how often pruning and training alternate")]
Group = Annotated[int, Range(1, 65_536, "weights", "how many weights go together")]
Tolerance = Annotated[float, Range(0, INF, "", "up to which a value counts as zero")]
Batches = Annotated[int, Range(1, INF, "batches", "training batches to look at")]
Threads = Annotated[int, Range(1, INF, "threads", "threads of a runtime")]
Probes = Annotated[int, Range(1, INF, "probes", "random vectors per batch")]
Bins = Annotated[int, Range(2, INF, "bins", "intervals of a histogram")]
Count = Annotated[int, Range(0, INF, "", "a whole number")]
Multiple = Annotated[int, Range(1, 4096, "units", "unit counts are rounded to multiples of it")]
Level = Annotated[float, Range(-INF, INF, "", "a value that weights may take")]
Channels = Annotated[int, Range(1, 65_536, "channels", "a number of channels, or of groups of them")]
Taps = Annotated[int, Range(1, 31, "taps", "width of a kernel")]
Rank = Annotated[int, Range(1, INF, "", "rank of a factorised weight")]
Generations = Annotated[int, Range(1, 1000, "generations", "networks that are born one after the other")]
