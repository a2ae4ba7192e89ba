"""One-dimensional k-means: the optimum is the optimum, Lloyd never does worse than it began."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.cluster import (
    Floats,
    Init,
    boundaries,
    exact,
    histogram,
    initial_centroids,
    lloyd,
    squared_error,
)
from espalier.core.errors import NumericError, UsageError

INITS: tuple[Init, ...] = ("linear", "density", "random")
numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=1, max_size=9).map(lambda v: np.sort(np.array(v, dtype=np.float64)))
larger = st.integers(0, 2**32 - 1).map(lambda s: np.sort(np.random.default_rng(s).normal(size=200).round(2)))


def interval_cost(values: Floats, weights: Floats) -> float:
    if not len(values):
        return 0.0
    mean = np.average(values, weights=weights)
    return float((weights * (values - mean) ** 2).sum())


def brute_force(values: Floats, k: int, weights: Floats | None = None) -> float:
    """The least error over all ways of cutting ``values`` into ``k`` intervals."""
    weights = np.ones(len(values)) if weights is None else weights
    n = len(values)
    return min(
        sum(interval_cost(values[a:b], weights[a:b]) for a, b in itertools.pairwise((0, *cuts, n)))
        for cuts in itertools.combinations_with_replacement(range(n + 1), min(k, n) - 1)
    )


def weighted_error(values: Floats, weights: Floats, centroids: Floats) -> float:
    distance = np.abs(values[:, None] - centroids[None, :]).min(axis=1)
    return float((weights * distance**2).sum())


@given(values=samples, k=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_exact_is_the_optimum(values: Floats, k: int) -> None:
    centroids = exact(values, k)
    assert len(centroids) <= k
    assert np.array_equal(centroids, np.unique(centroids))
    assert squared_error(values, centroids) == pytest.approx(brute_force(values, k), rel=1e-9, abs=1e-7)


@given(values=samples, k=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_exact_with_weights_is_the_optimum(values: Floats, k: int, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(1, 6, len(values)).astype(np.float64)
    centroids = exact(values, k, weights=weights)
    assert weighted_error(values, weights, centroids) == pytest.approx(
        brute_force(values, k, weights), rel=1e-9, abs=1e-7
    )


@given(values=samples, seed=st.integers(0, 999), k=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_weight_is_a_number_of_copies(values: Floats, seed: int, k: int) -> None:
    weights = np.random.default_rng(seed).integers(1, 4, len(values))
    copies = exact(np.repeat(values, weights), k)
    assert squared_error(
        np.repeat(values, weights), exact(values, k, weights=weights.astype(np.float64))
    ) == pytest.approx(squared_error(np.repeat(values, weights), copies), rel=1e-9, abs=1e-7)


@given(values=larger, k=st.integers(1, 12), init=st.sampled_from(INITS))
@settings(max_examples=40, deadline=None)
def test_exact_is_no_worse_than_lloyd(values: Floats, k: int, init: Init) -> None:
    assert (
        squared_error(values, exact(values, k))
        <= squared_error(values, lloyd(values, k, init=init)) * (1 + 1e-9) + 1e-9
    )


@given(values=larger, k=st.integers(1, 12), init=st.sampled_from(INITS))
@settings(max_examples=40, deadline=None)
def test_lloyd_never_goes_up(values: Floats, k: int, init: Init) -> None:
    errors = [squared_error(values, initial_centroids(values, k, init, np.random.default_rng(0)))]
    errors += [squared_error(values, lloyd(values, k, init=init, iterations=i)) for i in range(1, 12)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))


@given(values=larger, k=st.integers(1, 12), init=st.sampled_from(INITS))
@settings(max_examples=40, deadline=None)
def test_lloyd_ends_at_a_fixed_point(values: Floats, k: int, init: Init) -> None:
    centroids = lloyd(values, k, init=init)
    assert 1 <= len(centroids) <= k
    assert np.array_equal(centroids, np.sort(centroids))
    bounds = boundaries(values, centroids)
    for low, high, centroid in zip(bounds[:-1], bounds[1:], centroids, strict=True):
        assert high > low
        assert centroid == pytest.approx(values[low:high].mean(), rel=1e-9, abs=1e-9)


@given(values=larger, k=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_more_clusters_cost_no_more(values: Floats, k: int) -> None:
    assert squared_error(values, exact(values, k + 1)) <= squared_error(values, exact(values, k)) + 1e-9


@given(values=samples, centroids=samples)
@settings(deadline=None)
def test_boundaries_are_the_nearest_centroid(values: Floats, centroids: Floats) -> None:
    centroids = np.unique(centroids)
    bounds = boundaries(values, centroids)
    assigned = np.repeat(centroids, np.diff(bounds))
    nearest = np.abs(values[:, None] - centroids[None, :]).min(axis=1)
    assert np.abs(values - assigned) == pytest.approx(nearest, abs=1e-9)
    assert squared_error(values, centroids) == pytest.approx(float((nearest**2).sum()), rel=1e-9, abs=1e-9)


def test_ties_go_to_the_lower_centroid() -> None:
    assert boundaries(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0])).tolist() == [0, 2, 3]


@given(values=samples, extra=st.integers(0, 5), algorithm=st.sampled_from([exact, lloyd]))
@settings(deadline=None)
def test_enough_centroids_cost_nothing(values: Floats, extra: int, algorithm: object) -> None:
    if algorithm is exact:
        distinct = np.unique(values)
        assert np.array_equal(exact(values, len(distinct) + extra), distinct)
    else:
        found = lloyd(values, len(values) + extra, init="density")
        near = len(values) * (values[-1] - values[0]) ** 2 + 1e-24 * float((values**2).sum())
        assert squared_error(values, found) <= near


@pytest.mark.parametrize("init", INITS)
def test_one_value(init: Init) -> None:
    values = np.full(7, 0.25)
    assert exact(values, 4).tolist() == [0.25]
    assert lloyd(values, 4, init=init).tolist() == [0.25]
    assert histogram(values, 16)[0].tolist() == [0.25]
    assert histogram(values, 16)[2] == 0


@given(values=larger, bins=st.sampled_from([4, 16, 64, 256]), k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_histogram_bound(values: Floats, bins: int, k: int) -> None:
    """The bins' means keep count and sum; the optimum on the bins is within the stated bound of the optimum."""
    means, counts, error = histogram(values, bins)
    assert len(means) <= bins
    assert counts.sum() == len(values)
    assert (means * counts).sum() == pytest.approx(values.sum(), rel=1e-9, abs=1e-6)
    assert np.array_equal(means, np.sort(means))
    width = (values[-1] - values[0]) / bins
    assert error <= width * (1 + 1e-9)
    inside = squared_error(values, means)
    on_bins, optimum = squared_error(values, exact(means, k, weights=counts)), squared_error(values, exact(values, k))
    assert optimum <= on_bins + 1e-9
    assert math.sqrt(on_bins) <= math.sqrt(optimum) + 2 * math.sqrt(len(values)) * error + 1e-9
    assert inside <= len(values) * error**2 + 1e-9


def test_bad_input() -> None:
    for function in (exact, lloyd):
        with pytest.raises(UsageError, match="k=0 clusters"):
            function(np.ones(3), 0)
        with pytest.raises(UsageError, match="no value"):
            function(np.zeros(0), 2)
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(NumericError):
                function(np.sort(np.array([0.0, bad, 1.0])), 2)


def test_known_clusters() -> None:
    values = np.sort(np.concatenate([np.full(5, c) + d for c, d in ((-3.0, 0.1), (0.0, -0.1), (4.0, 0.0))]))
    assert exact(values, 3) == pytest.approx([-2.9, -0.1, 4.0])
    assert lloyd(values, 3, init="linear") == pytest.approx([-2.9, -0.1, 4.0])


def test_random_init_is_the_generators() -> None:
    values = np.sort(np.random.default_rng(0).normal(size=500))
    one, again, other = (lloyd(values, 8, init="random", iterations=1, rng=np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
