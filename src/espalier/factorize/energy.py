r"""Ranks by energy: as many as hold a given share of the squared singular values.

Paper    none
Formula  r = min { r : sum_{k <= r} s_k^2 >= energy * sum_k s_k^2 }, for every unfolding that has a rank
Departs  A layer that these ranks would not make smaller is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.factorize.rank import RankChoice, each, or_skip
from espalier.factorize.split import Ranks, Split


def energy_rank(share: Tensor, energy: float) -> int:
    """The lowest rank from 1 whose leading ``share`` (n,) adds up to ``energy``; n + 1 where none does."""
    return int((share.cumsum(0) < energy - 1e-12).sum()) + 1


@dataclass(frozen=True, kw_only=True)
class Energy(RankChoice):
    """``energy``: share of the squared norm that each unfolding keeps."""

    id: ClassVar[str] = "energy"
    energy: Fraction = 0.9

    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """By each layer alone."""
        return each(splits, context, lambda split: self._ranks(split, context))

    def _ranks(self, split: Split, context: Context) -> Ranks | None:
        ranks = tuple(energy_rank(share, self.energy) for share in split.losses)
        return or_skip(split, ranks, f"holds {self.energy:.4g} of its energy", context)
