from __future__ import annotations

import math
import re
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from espalier.report.budget import Budget, Share, largest
from espalier.report.charts import curve, linear_ticks, log_ticks, scatter, stacked
from espalier.report.steps import Curve
from espalier.report.terminal import _budget, bar
from espalier.report.tries import tries

PARTS = st.lists(st.tuples(st.sampled_from(["values", "positions", "graph", "new"]), st.integers(1, 10**9)), max_size=6)


@settings(deadline=None)
@given(PARTS, st.integers(0, 10**9))
def test_a_stacked_bar_is_as_long_as_its_bytes(parts, more) -> None:
    total = sum(size for _, size in parts)
    drawn = stacked(tuple(parts), total + more, "x")
    widths = [float(w) for w in re.findall(r' width="([\d.]+)"', drawn)]
    assert len(widths) == len(parts)
    starts = [float(x) for x in re.findall(r' x="([\d.]+)"', drawn)]
    assert starts == [pytest.approx(sum(widths[:k]), abs=0.1) for k in range(len(parts))]
    if total:
        assert sum(widths) == pytest.approx(1000 * total / (total + more), abs=0.01 * len(parts) + 0.01)
        assert len(bar(tuple(parts), total)) == 28


def test_the_rest_in_one_row_does_not_set_the_scale() -> None:
    shares = tuple(Share(f"t{k}", "", "", (("values", 100),), 100) for k in range(100))
    out = StringIO()
    Console(file=out, width=120).print(_budget(Budget(10_000, (("values", 10_000),), shares, 0)))
    lines = out.getvalue().splitlines()
    assert [line.count("v") for line in lines if line.startswith("t") and "100 B" in line] == [28] * 12
    assert "88 smaller tensors" in lines[-1]
    assert "8,800 B" in lines[-1]


def test_kinds_not_known_here_share_a_class() -> None:
    assert 'class="k-other"' in stacked((("quantum", 5),), 5, "x")


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_linear_ticks_are_few_round_and_inside(low, span, about) -> None:
    high = low + span
    ticks = linear_ticks(low, high, about)
    if high > low + 1e-9 * abs(low):
        slack = 1e-6 * (high - low) + 1e-9 * abs(low)
        assert all(low - slack <= tick <= high + slack for tick in ticks)
        assert len(ticks) <= about + 2


@given(st.floats(1, 1e9), st.floats(8, 1e6))
def test_log_ticks_are_inside(low, times) -> None:
    ticks = log_ticks(low, low * times)
    assert all(low <= tick <= low * times for tick in ticks)
    assert {round(t / 10 ** math.floor(math.log10(t) + 1e-9)) for t in ticks} <= {1, 2, 5}


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(-1e100, 1e100)), min_size=2, max_size=20))
def test_a_curve_stays_in_its_frame(points) -> None:
    drawn = curve(Curve("loss", "", tuple(points)))
    (line,) = re.findall(r'points="([^"]+)"', drawn)
    for pair in line.split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 300
        assert 0 <= y <= 150


def test_nearly_equal_values_are_drawn() -> None:
    assert "NaN" not in curve(Curve("loss", "", ((1, 98.4), (2, 98.4 + 1.5e-14), (3, 98.4))))


@given(st.lists(st.tuples(st.integers(1, 10**12), st.floats(0, 100)), min_size=2, max_size=12))
def test_every_complete_try_is_one_mark_in_the_frame(entries) -> None:
    found = tries([{"bytes": b, "metric": m, "kept": k % 2 == 0} for k, (b, m) in enumerate(entries)], "%", None)
    drawn = scatter(found, "accuracy", "%")
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5" class="(kept|tried)"', drawn)
    assert len(marks) == len(entries)
    assert all(64 <= float(x) <= 696 and 16 <= float(y) <= 274 for x, y, _ in marks)
    assert [css for *_, css in marks].count("kept") == (len(entries) + 1) // 2


def test_the_written_file_is_ringed() -> None:
    given_ = [{"bytes": 100, "metric": 90, "kept": True}, {"bytes": 200, "metric": 91, "kept": False}]
    assert scatter(tries(given_, "%", 100), "accuracy", "%").count('class="final"') == 1
    assert scatter(tries(given_, "%", 200), "accuracy", "%").count('class="final"') == 0
    assert scatter(tries(given_[:1], "%", 100), "accuracy", "%") == ""


@given(st.lists(st.integers(1, 10**6), max_size=60), st.integers(1, 30))
def test_the_rest_keeps_every_byte(sizes, limit) -> None:
    sizes = sorted(sizes, reverse=True)
    shares = [Share(f"t{k}", "", "", (("values", size),), size) for k, size in enumerate(sizes)]
    shown = largest(shares, limit)
    assert sum(share.total for share in shown) == sum(sizes)
    assert len(shown) <= limit + 1
