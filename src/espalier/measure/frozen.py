"""What of a model goes into a file, and how long the file of its weights would be now."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.norms import Normalise
from espalier.core.parametrize import freeze
from espalier.core.plan import Plan, applied
from espalier.core.representation import Representation
from espalier.encode import encode


@dataclass(frozen=True)
class Weights:
    """``model``: the copy the rest was read from, on the CPU, its batch norms reduced to a scale and a shift.

    ``tensors`` and ``aliases`` (tied name -> name) without the batch norms' ``statistics``, which no file needs then;
    ``plan``: what a receiver replays.
    """

    model: nn.Module
    tensors: dict[str, Representation]
    aliases: dict[str, str]
    plan: Plan
    statistics: AbstractSet[str]


def frozen_weights(model: nn.Module) -> Weights:
    """Every weight of ``model`` as it is stored."""
    model = copy_model(model).cpu().eval()
    normalise = Normalise()
    statistics = normalise.statistics(model)
    if statistics:
        Plan((normalise,)).apply(model)
    tensors, aliases = freeze(model)
    return Weights(
        model,
        {name: tensor for name, tensor in tensors.items() if name not in statistics},
        {name: target for name, target in aliases.items() if name not in statistics},
        applied(model),
        statistics,
    )


def file_length(model: nn.Module, context: Context, coders: Iterable[str]) -> int:
    """Bytes of the weights-only file of ``model``, remaining floats as fp32, with progress."""

    def tell(done: int, total: int) -> None:
        context.progress("weighing", done, total)

    weights = frozen_weights(model)
    return len(
        encode(
            weights.tensors, aliases=weights.aliases, plans=weights.plan.to_json(), coders=tuple(coders), floats="fp32",
            progress=tell,
        )
    )  # fmt: skip
