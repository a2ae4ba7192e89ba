"""Pruning: criterion x pattern x scope x schedule."""

from espalier.core.registry import register
from espalier.prune.magnitude import Magnitude
from espalier.prune.parts import Criterion, Pattern, Schedule, Scope
from espalier.prune.prune import Prune
from espalier.prune.random import Random
from espalier.prune.schedules import Cubic, Linear, Listed, OneShot
from espalier.prune.scopes import Global, Layer
from espalier.prune.threshold import Threshold
from espalier.prune.weights import Weights

METHODS = register(
    "prune", (Prune, Magnitude, Threshold, Random, Weights, Layer, Global, OneShot, Linear, Cubic, Listed)
)

__all__ = ["Criterion", "Cubic", "Global", "Layer", "Linear", "Listed", "Magnitude", "OneShot", "Pattern", "Prune",
           "Random", "Schedule", "Scope", "Threshold", "Weights"]  # fmt: skip
