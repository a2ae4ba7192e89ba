"""Seconds of one-dimensional k-means: 1,000,000 weights, 32 centroids, sorting included."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save

from espalier.core.cluster import exact, histogram, lloyd, squared_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.parse_args()
    weights = np.random.default_rng(0).normal(size=1_000_000)
    rows = []

    def run_lloyd() -> tuple[np.ndarray, float]:
        return lloyd(np.sort(weights), 32), 0.0

    def run_exact() -> tuple[np.ndarray, float]:
        values, counts, error = histogram(np.sort(weights), 2**14)
        return exact(values, 32, weights=counts), error

    ordered = np.sort(weights)
    for label, function in (("lloyd, linear initialisation", run_lloyd), ("exact on 2^14 bins", run_exact)):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            centroids, error = function()
            seconds.append(time.perf_counter() - started)
        rows.append({
            "id": "share.kmeans", "row": label, "claimed": {},
            "measured": {"seconds_median": statistics.median(seconds), "seconds_max": max(seconds),
                         "squared_error": squared_error(ordered, centroids), "largest_bin_error": error},
            "setting": {"weights": weights.size, "centroids": 32, "distribution": "normal", "runs": 5},
            "seed": 0,
        })  # fmt: skip
        print(label, rows[-1]["measured"])
    save("kmeans", rows)


if __name__ == "__main__":
    main()
