r"""Ranks given by hand: one number, or one for each pattern of layer names.

Paper    none
Formula  r = rank
Departs  A rank that would not make its layer smaller is lowered to the highest that does, and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Rank
from espalier.core.selection import Selection, by_pattern
from espalier.factorize.rank import RankChoice, each, shown
from espalier.factorize.split import Ranks, Split, first_gain


@dataclass(frozen=True, kw_only=True)
class Fixed(RankChoice):
    """``rank``: a number, or pattern -> number; layers that answer to no pattern are left alone."""

    id: ClassVar[str] = "fixed"
    rank: Rank | dict[str, Rank] = 8

    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """As given. Raises ``UnknownNameError`` for a pattern that no weight answers to."""
        selection = Selection(tuple(split.layer.slot for split in splits))
        table, default = (self.rank, 0) if isinstance(self.rank, dict) else ({}, self.rank)
        given = by_pattern(model, selection, table, default, who=self.name)
        return each(splits, context, lambda split: self._ranks(split, given[split.name], context))

    def _ranks(self, split: Split, rank: int, context: Context) -> Ranks | None:
        if not rank:
            context.skip(split.name, "no rank is given for it")
            return None
        asked = tuple(min(rank, limit) for limit in split.limits)
        ranks = first_gain(split, asked)
        if ranks is not None and max(ranks) < rank:
            context.note(f"{split.name}: rank {rank} would not make it smaller; {shown(ranks)} it is.")
        return ranks
