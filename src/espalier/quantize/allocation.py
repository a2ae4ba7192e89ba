"""One option for every layer under a budget: the choice that costs least in value among those that fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LARGEST_FRONT = 4096


def allocate(values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The index of the option of each layer: the least sum of ``values`` whose sum of ``costs`` is within ``budget``.

    Dynamic programming over the pairs (cost, value) that no other pair beats in both. It is exact while there are at
    most ``LARGEST_FRONT`` of these; beyond, the best in each of as many equal intervals of the cost goes on. Of equal
    values the cheaper is taken. None where even the cheapest options cost more.
    """
    budget += 1e-9 * abs(budget)
    rest = np.cumsum([min(options) for options in costs][::-1])[::-1]
    if len(rest) and rest[0] > budget:
        return None
    total, worth = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for layer, (value, cost) in enumerate(zip(values, costs, strict=True)):
        left = budget - (rest[layer + 1] if layer + 1 < len(rest) else 0.0)
        sums = (total[:, None] + np.asarray(cost, float)).ravel()
        worths = (worth[:, None] + np.asarray(value, float)).ravel()
        order = np.lexsort((worths, sums))
        order = order[sums[order] <= left]
        best = np.minimum.accumulate(worths[order])
        order = order[np.concatenate([[True], worths[order][1:] < best[:-1]])]
        if len(order) > LARGEST_FRONT:
            order = _thinned(order, sums)
        steps.append((order // len(cost), order % len(cost)))
        total, worth = sums[order], worths[order]
    at, found = int(np.argmin(worth)), []
    for before, option in reversed(steps):
        found.append(int(option[at]))
        at = int(before[at])
    return found[::-1]


def _thinned(order: NDArray[np.int64], sums: NDArray[np.float64]) -> NDArray[np.int64]:
    """The last pair, which is the best, of each of equal intervals of the cost, and the cheapest of all."""
    low, high = sums[order[0]], sums[order[-1]]
    place = np.minimum((sums[order] - low) / (high - low) * (LARGEST_FRONT - 1), LARGEST_FRONT - 2).astype(int)
    last = np.concatenate([place[1:] != place[:-1], [True]])
    last[0] = True
    found: NDArray[np.int64] = order[last]
    return found
