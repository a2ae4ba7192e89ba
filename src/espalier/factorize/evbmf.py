r"""Ranks by empirical variational Bayes: what stands out of the noise, with no threshold to choose.

Paper    Nakajima, Sugiyama, Babacan, Tomioka. Global Analytic Solution of Fully-observed Variational Bayesian Matrix
         Factorization. JMLR 14, 2013. For convolutions: Kim, Park, Yoo, Choi, Yang, Shin. Compression of Deep
         Convolutional Neural Networks for Fast and Low Power Mobile Applications. ICLR 2016. arXiv:1511.06530
Formula  L x M matrix, L <= M, a = L / M, t(x) = (x - 1 - a + sqrt((x - 1 - a)^2 - 4a)) / 2, t0 = 2.5129 sqrt(a),
         x0 = (1 + t0)(1 + a / t0);  noise v = argmin sum_{x_k <= x0} (x_k - log x_k)
         + sum_{x_k > x0} (x_k - t_k + log((t_k + 1) / x_k) + a log(t_k / a + 1)) with x_k = s_k^2 / (M v);
         r = #{ k : s_k^2 > M v x0 }
Departs  The minimum over v is sought on a grid and then between its neighbours. ``weaken`` takes only a part of the way
         down from the full rank, as MUSCO does (Gusak et al. 2019, arXiv:1903.09973). Where the rank is 0 or would not
         make the layer smaller, ranks by energy are taken, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from espalier.core.context import Context
from espalier.core.fields import Fraction
from espalier.factorize.energy import energy_rank
from espalier.factorize.rank import RankChoice, each, or_skip, shown
from espalier.factorize.split import Ranks, Split, Unfolding

Floats = NDArray[np.float64]
GRID, STEPS = 400, 60
NOISELESS = 1e-10
"""Where the smaller half holds less than this share of the energy there is no noise: the rank is what there is."""


def evbmf_rank(values: Floats, rows: int, columns: int) -> int:
    """The rank of a ``rows`` x ``columns`` matrix by its singular ``values``; zeros past its smaller side are none."""
    L, M = min(rows, columns), max(rows, columns)
    s2 = np.sort(values.astype(np.float64) ** 2)[::-1][:L]
    if not s2.any():
        return 0
    if s2[L // 2 :].sum() <= NOISELESS * s2.sum():
        return int((s2 > NOISELESS * s2[0]).sum())
    s2 = np.maximum(s2, NOISELESS * s2[0])
    a = L / M
    t0 = 2.5129 * math.sqrt(a)
    x0 = (1 + t0) * (1 + a / t0)
    most = min(math.ceil(L / (1 + a)) - 1, L - 1)
    high = s2.sum() / (L * M)
    low = max(s2[most] / (M * x0), s2[most:].mean() / M)

    def objective(log_v: float) -> float:
        x = s2 / (M * math.exp(log_v))
        noise, signal = x[x <= x0], x[x > x0]
        t = (signal - 1 - a + np.sqrt(np.maximum((signal - 1 - a) ** 2 - 4 * a, 0))) / 2
        kept = signal - t + np.log((t + 1) / signal) + a * np.log(t / a + 1)
        return float((noise - np.log(noise)).sum() + kept.sum())

    grid = np.linspace(math.log(min(low, high)), math.log(high), GRID)
    best = int(np.argmin([objective(v) for v in grid]))
    left, right = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        one, two = right - golden * (right - left), left + golden * (right - left)
        left, right = (left, two) if objective(one) <= objective(two) else (one, right)
    return int((s2 > M * math.exp((left + right) / 2) * x0).sum())


@dataclass(frozen=True, kw_only=True)
class Evbmf(RankChoice):
    """``weaken``: 1 takes the rank found, 0 the full one. ``energy``: for the layers where none is found."""

    id: ClassVar[str] = "evbmf"
    weaken: Fraction = 1.0
    energy: Fraction = 0.9

    def choose(self, splits: Sequence[Split], model: nn.Module, context: Context) -> list[Ranks | None]:
        """By each layer alone."""
        return each(splits, context, lambda split: self._ranks(split, context))

    def _ranks(self, split: Split, context: Context) -> Ranks | None:
        found = [self._rank(unfolding) for unfolding in split.unfoldings]
        if len(split.limits) < len(found):  # one rank for all unfoldings
            found = [max(found)]
        weakened = tuple(
            limit - int(self.weaken * (limit - min(rank, limit)))
            for limit, rank in zip(split.limits, found, strict=True)
        )
        if all(found) and split.gains(weakened):
            return weakened
        why = "0" if not all(found) else f"{shown(weakened)}, which does not make it smaller"
        context.note(
            f"{split.name}: EVBMF gives {why}; its rank is the one that holds {self.energy:.4g} of the energy."
        )
        ranks = tuple(energy_rank(share, self.energy) for share in split.losses)
        return or_skip(split, ranks, f"holds {self.energy:.4g} of its energy (EVBMF gives {why})", context)

    @staticmethod
    def _rank(unfolding: Unfolding) -> int:
        """The highest over the groups of the layer."""
        return max(evbmf_rank(values, *unfolding.shape) for values in unfolding.values.double().cpu().numpy())
