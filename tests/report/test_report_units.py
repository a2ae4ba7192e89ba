from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.report import units


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (17_900, "17.9 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (1_066_800, "1.07 MB"), (46_700_000, "46.7 MB"), (2.5e13, "25.0 TB"), (-5, "−5 B"), (-1500, "−1.50 kB")],
)  # fmt: skip
def test_sizes(number, text) -> None:
    assert units.size(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (266_610, "266,610"), (9_999_999, "9,999,999"), (10_000_000, "10.0 M"), (25_557_032, "25.6 M"),
     (999_499_999, "999 M"), (999_999_999, "1.00 G"), (4.09e9, "4.09 G"), (1.5e16, "15,000 T"), (-3, "−3"),
     (1.5, "1.50")],
)  # fmt: skip
def test_counts(number, text) -> None:
    assert units.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(59.597, "59.6x"), (1.0, "1.00x"), (9.999, "10.0x"), (124.6, "125x"), (1249.4, "1,249x")]
)
def test_ratios(number, text) -> None:
    assert units.times(number) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "0 %"), (1, "100 %"), (0.0785, "7.8 %"), (0.0004, "<0.1 %"), (0.9999, ">99.9 %"), (0.5, "50.0 %")],
)
def test_percentages_never_round_to_none_or_all(fraction, text) -> None:
    assert units.percent(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0423, "0.0423 s"), (9.996, "10.0 s"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.6, "1 h 00 min"), (3725, "1 h 02 min")],
)  # fmt: skip
def test_durations(seconds, text) -> None:
    assert units.duration(seconds) == text


def test_metrics_and_changes() -> None:
    assert units.value(98.384, "%", 0.1254) == "98.38 ± 0.13 %"
    assert units.value(0.41234, "", 0.0102) == "0.4123 ± 0.0102"
    assert units.signed(-0.04, "%") == "−0.04 points"
    assert units.signed(0.24, "%") == "+0.24 points"
    assert units.signed(0.0, "%") == "no change"
    assert units.signed(-0.004, "%") == "less than 0.01 points"
    assert units.signed(-0.0123, "", like=0.4) == "−0.0123"
    assert units.drop(0.1, "%") == "0.10 points"
    assert units.drop(-0.1, "dB") == "−0.1000 dB"


@given(st.floats(-1e14, 1e14).filter(lambda x: abs(x) > 1e-4))
def test_significant_is_near(number) -> None:
    shown = float(units.significant(number, 4).replace(",", "").replace(units.MINUS, "-"))
    assert shown == pytest.approx(number, rel=1e-3)


@given(st.text())
def test_printable_is_one_short_harmless_line(text) -> None:
    shown = units.printable(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 50
    shown.encode("utf-8")


def test_printable_keeps_ordinary_names() -> None:
    assert units.printable("features.0.weight") == "features.0.weight"
    assert units.printable("a\n b\x1b[31m\u202ec") == "a b\ufffd[31m\ufffdc"
    assert units.printable("x" * 1000, 10) == "xxxxxxxxx…"
