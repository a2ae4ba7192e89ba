r"""Ranks by ratio: every layer keeps a given share of its parameters.

Paper    none
Formula  the highest ranks with P(r) <= keep * P;   for one rank r = floor(keep m n / (m + n))
Departs  Where there are several ranks, each step down takes the one that loses least per parameter saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.factorize.rank import RankChoice, each, shown
from espalier.factorize.split import Ranks, Split, path


@dataclass(frozen=True, kw_only=True)
class Ratio(RankChoice):
    """``keep``: share of the parameters of each layer that it keeps at most."""

    id: ClassVar[str] = "ratio"
    keep: Fraction = 0.5

    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """By each layer alone."""
        return each(splits, context, lambda split: self._ranks(split, context))

    def _ranks(self, split: Split, context: Context) -> Ranks:
        allowed = self.keep * split.layer.dense.parameters
        steps = path(split)
        for step in steps:
            if step.cost.parameters <= allowed and split.gains(step.ranks):
                return step.ranks
        last = steps[-1]
        context.note(
            f"{split.name}: {shown(last.ranks)}, the lowest, keeps {last.cost.parameters} of "
            f"{split.layer.dense.parameters} parameters, more than the share of {self.keep:.4g}."
        )
        return last.ranks
