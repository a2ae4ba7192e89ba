from __future__ import annotations

import subprocess
import sys

import pytest

from espalier.measure import compare

METRIC = {"name": "accuracy", "unit": "%", "higher_is_better": True, "split": "test"}
BEFORE = {
    "file_bytes": 1_000_000, "parameters": 250_000, "nonzero": 250_000, "macs": 4_000,
    "latency": {"median_ms": 2.0, "p10_ms": 1.9, "p90_ms": 2.4, "runs": 30, "batch": 1, "threads": 1},
    "throughput": {"per_second": 1000.0, "p10_ms": 50.0, "p90_ms": 80.0, "runs": 30, "batch": 64, "threads": 1},
    "peak_memory": {"bytes": 3_000_000},
    "metric": {**METRIC, "value": 98.4, "stderr": 0.1},
}  # fmt: skip
AFTER = {
    "file_bytes": 20_000, "parameters": 250_000, "nonzero": 20_000, "macs": 4_000,
    "latency": {"median_ms": 2.5, "p10_ms": 2.4, "p90_ms": 2.6, "runs": 30, "batch": 1, "threads": 2},
    "throughput": {"per_second": 2000.0, "runs": 30, "batch": 64, "threads": 1},
    "peak_memory": {"bytes": 3_000_000},
    "metric": {**METRIC, "value": 98.1, "stderr": 0.2},
}  # fmt: skip


def test_ratios_say_how_many_times_better() -> None:
    rows = {row.key: row for row in compare(BEFORE, AFTER)}
    assert list(rows) == [
        "file_bytes",
        "parameters",
        "nonzero",
        "macs",
        "latency",
        "throughput",
        "peak_memory",
        "metric",
    ]
    assert (rows["file_bytes"].ratio, rows["file_bytes"].better) == (50, True)
    assert (rows["parameters"].ratio, rows["parameters"].better) == (1, None)
    assert rows["nonzero"].ratio == 12.5
    assert (rows["latency"].ratio, rows["latency"].better) == (0.8, False)
    assert rows["latency"].spread == ((1.9, 2.4), (2.4, 2.6))
    assert rows["latency"].note == "batch 1, median of 30"  # the thread counts differ: not stated as one
    assert (rows["throughput"].ratio, rows["throughput"].better) == (2, True)
    assert rows["throughput"].spread == ((800, 1280), None)
    assert rows["throughput"].note == "batch 64, 1 thread, median of 30"


def test_a_metric_changes_by_a_difference() -> None:
    row = compare(BEFORE, AFTER)[-1]
    assert (row.label, row.unit, row.ratio) == ("accuracy, test", "%", None)
    assert row.change == pytest.approx(-0.3)
    assert row.better is False
    assert row.spread == ((98.4 - 0.1, 98.4 + 0.1), (98.1 - 0.2, 98.1 + 0.2))
    lower = {"metric": {"name": "loss", "higher_is_better": False, "value": 1.0}}
    row = compare(lower, {"metric": {**lower["metric"], "value": 0.5}})[-1]
    assert (row.better, row.change) == (True, -0.5)


@pytest.mark.parametrize("junk", [None, "x", float("nan"), float("inf"), True, [], {}, 10**400])
def test_what_is_no_number_is_not_shown(junk) -> None:
    rows = compare({"file_bytes": junk, "nonzero": 5, "latency": junk}, {"macs": junk, "metric": junk})
    assert [(row.key, row.before, row.after, row.ratio) for row in rows] == [("nonzero", 5, None, None)]


def test_nothing_in_nothing_out() -> None:
    assert compare(None, None) == []
    assert compare({"file_bytes": 0}, {"file_bytes": 5})[0].ratio is None


def test_comparing_plain_data_imports_no_torch() -> None:
    code = "import sys; from espalier.measure import compare; compare({}, {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
