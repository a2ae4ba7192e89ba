"""How many ranks each layer keeps: the part type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.method import Method
from espalier.factorize.split import Ranks, Split, first_gain


@dataclass(frozen=True, kw_only=True)
class RankChoice(Method):
    """A rule for ranks. No rule ever makes a layer larger."""

    kind: ClassVar[str] = "rank"

    @abstractmethod
    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """The ranks of each layer; None where it is left alone, which is said by ``context.skip``."""


def each(splits: Sequence[Split], context: Context, rule: Callable[[Split], Ranks | None]) -> list[Ranks | None]:
    """``rule`` of every layer that any rank makes smaller."""
    found = []
    for done, split in enumerate(splits, 1):
        found.append(rule(split) if worthwhile(split, context) else None)
        context.progress("ranks", done, len(splits))
    return found


def worthwhile(split: Split, context: Context) -> bool:
    """Whether any rank makes the layer smaller; if not, that is said."""
    if split.gains((1,) * len(split.limits)):
        return True
    smallest, dense = split.cost((1,) * len(split.limits)), split.layer.dense
    more = f" and {smallest.macs} multiplications, not {dense.macs}" if smallest.macs > dense.macs else ""
    context.skip(
        split.name, f"too small to gain: at rank 1 it has {smallest.parameters} numbers, not {dense.parameters}{more}"
    )
    return False


def shown(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 3, 5``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def or_skip(split: Split, ranks: Ranks, why: str, context: Context) -> Ranks | None:
    """``ranks`` where they make the layer smaller, else None, said with ``why`` so much was asked for."""
    if split.gains(ranks):
        return ranks
    most = first_gain(split)
    limit = "" if most is None else f"; {shown(most)} would be the highest that does"
    context.skip(split.name, f"{shown(ranks)} {why}, which does not make it smaller{limit}")
    return None
