r"""One-dimensional k-means: exact and Lloyd, on sorted values, without a table of n x k.

Source   Lloyd 1982; Wang & Song, Ckmeans.1d.dp, R Journal 2011; Gronlund et al., arXiv:1701.07204 (monotone search).

Sorted values make every cluster an interval: its cost is a difference of prefix sums, an assignment step is one
``searchsorted`` of k - 1 boundaries, and the optimum is a shortest path over intervals.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import NumericError, UsageError

Floats = NDArray[np.float64]
Init = Literal["linear", "density", "random"]


def initial_centroids(values: Floats, k: int, init: Init, rng: np.random.Generator) -> Floats:
    """``k`` starting centroids for sorted ``values`` (n,).

    ``linear``: equally spaced over [min, max]; ``density``: equally spaced in the cumulative distribution;
    ``random``: drawn from the values. Deep Compression, section 3.2.
    """
    if init == "linear":
        return np.linspace(values[0], values[-1], k)
    if init == "density":
        return values[np.minimum((np.arange(k) + 0.5) * len(values) / k, len(values) - 1).astype(np.int64)]
    return np.sort(rng.choice(values, size=k, replace=len(values) < k))


def lloyd(
    values: Floats, k: int, *, init: Init = "linear", iterations: int = 300, rng: np.random.Generator | None = None
) -> Floats:
    """Lloyd's centroids (at most ``k``, sorted, empty clusters dropped) of sorted ``values`` (n,).

    O(k log n) per iteration after one prefix sum; stops when no boundary moves.
    """
    _check(values, k)
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    centroids = initial_centroids(values, k, init, rng or np.random.default_rng(0))
    previous: NDArray[np.int64] | None = None
    for _ in range(iterations):
        bounds = boundaries(values, centroids)
        if previous is not None and np.array_equal(bounds, previous):
            break
        previous = bounds
        counts = np.diff(bounds)
        sums = np.diff(prefix[bounds])
        centroids = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
    used = np.diff(boundaries(values, centroids)) > 0
    return centroids[used]


def boundaries(values: Floats, centroids: Floats) -> NDArray[np.int64]:
    """Interval ends (k + 1,) of the nearest-centroid assignment of sorted ``values``; ties go to the lower centroid."""
    middle = (centroids[1:] + centroids[:-1]) / 2
    return np.concatenate([[0], np.searchsorted(values, middle, side="right"), [len(values)]]).astype(np.int64)


def exact(values: Floats, k: int, *, weights: Floats | None = None) -> Floats:
    """The centroids (at most ``k``, sorted) of least squared error for sorted ``values`` (n,), optionally weighted.

    Dynamic programming over intervals. For fixed k the best split point never moves left as the interval grows, so
    each row is solved by vectorised divide and conquer: O(k n log n) time, O(k n) memory for the splits.
    """
    _check(values, k)
    weight = np.ones(len(values)) if weights is None else weights.astype(np.float64)
    distinct, inverse = np.unique(values, return_inverse=True)
    if len(distinct) <= k:
        return distinct
    mass = np.bincount(inverse, weights=weight)
    shifted = distinct - np.average(distinct, weights=mass)  # centred: the prefix sums lose no digits
    n = len(distinct)
    w = np.concatenate([[0.0], np.cumsum(mass)])
    s = np.concatenate([[0.0], np.cumsum(mass * shifted)])
    q = np.concatenate([[0.0], np.cumsum(mass * shifted * shifted)])

    def cost(low: NDArray[np.int64], high: NDArray[np.int64]) -> Floats:
        """Squared error of the values low..high-1 around their mean."""
        total = w[high] - w[low]
        mean = s[high] - s[low]
        error: Floats = np.maximum(q[high] - q[low] - mean * mean / np.where(total > 0, total, 1.0), 0.0)
        return error

    ends = np.arange(n + 1)
    best = cost(np.zeros(n + 1, dtype=np.int64), ends)
    splits = np.zeros((k, n + 1), dtype=np.int32)
    for row in range(1, k):
        best, splits[row] = _row(best, cost, n, row)
    cuts = [n]
    for row in range(k - 1, 0, -1):
        cuts.append(int(splits[row, cuts[-1]]))
    bounds = np.array([0, *reversed(cuts)])
    bounds = np.unique(bounds)
    return np.add.reduceat(mass * distinct, bounds[:-1]) / np.add.reduceat(mass, bounds[:-1])


def _row(best: Floats, cost: object, n: int, row: int) -> tuple[Floats, NDArray[np.int32]]:
    """One more cluster: new[j] = min over i of best[i] + cost(i, j), by levels of the divide-and-conquer tree.

    All midpoints of a level are searched together: their candidate ranges overlap in single points only, so a level
    costs O(n) and there are log2(n) levels.
    """
    new = np.full(n + 1, np.inf)
    split = np.zeros(n + 1, dtype=np.int32)
    low_j, high_j = np.array([row]), np.array([n])
    low_i, high_i = np.array([row - 1]), np.array([n - 1])
    while len(low_j):
        mid = (low_j + high_j) // 2
        first, last = low_i, np.minimum(high_i, mid - 1)
        widths = last - first + 1
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        candidate = np.arange(int(widths.sum())) - np.repeat(starts - first, widths)
        value = best[candidate] + cost(candidate, np.repeat(mid, widths))  # type: ignore[operator]
        least = np.minimum.reduceat(value, starts)
        hit = np.flatnonzero(value == np.repeat(least, widths))
        owner = np.repeat(np.arange(len(mid)), widths)[hit]
        chosen = candidate[hit[np.searchsorted(owner, np.arange(len(mid)))]]
        new[mid], split[mid] = least, chosen
        left, right = low_j < mid, mid < high_j
        low_j, high_j, low_i, high_i = (
            np.concatenate([low_j[left], mid[right] + 1]),
            np.concatenate([mid[left] - 1, high_j[right]]),
            np.concatenate([low_i[left], chosen[right]]),
            np.concatenate([chosen[left], high_i[right]]),
        )
    return new, split


def histogram(values: Floats, bins: int) -> tuple[Floats, Floats, float]:
    """Means and counts of the non-empty of ``bins`` equal bins, and the largest distance of a value to its bin's mean.

    The exact optimum on the bins costs at most ``n * error**2`` more than the optimum on the values, plus the error
    inside the bins, which is the same for every clustering.
    """
    low, high = float(values[0]), float(values[-1])
    if low == high:
        return np.array([low]), np.array([float(len(values))]), 0.0
    index = np.minimum(((values - low) * (bins / (high - low))).astype(np.int64), bins - 1)
    counts = np.bincount(index, minlength=bins).astype(np.float64)
    sums = np.bincount(index, weights=values, minlength=bins)
    mean = sums / np.maximum(counts, 1)
    error = float(np.abs(values - mean[index]).max())
    return mean[counts > 0], counts[counts > 0], error


def squared_error(values: Floats, centroids: Floats) -> float:
    """Sum over sorted ``values`` of the squared distance to the nearest of sorted ``centroids``."""
    counts = np.diff(boundaries(values, centroids))
    return float(np.square(values - np.repeat(centroids, counts)).sum())


def _check(values: Floats, k: int) -> None:
    if k < 1:
        raise UsageError(f"k={k} clusters; 1 or more allowed.")
    if not len(values):
        raise UsageError("no value to cluster; give at least one.")
    if not (np.isfinite(values[0]) and np.isfinite(values[-1])):
        raise NumericError("NaN or infinity among the values to cluster.")
