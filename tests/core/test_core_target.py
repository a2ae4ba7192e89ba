"""What the user asks for, in the user's units."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.core.errors import UsageError
from espalier.core.target import Target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10x", Target(times=10)),
        ("2.5x", Target(times=2.5)),
        ("200kB", Target(size=200_000)),
        ("200KB", Target(size=200_000)),
        ("200KiB", Target(size=204_800)),
        ("1.5MiB", Target(size=1_572_864)),
        ("1MB", Target(size=1_000_000)),
        ("2GB", Target(size=2_000_000_000)),
        ("1GiB", Target(size=2**30)),
        ("8500", Target(size=8500)),
        ("8500B", Target(size=8500)),
        (" 10 x ", Target(times=10)),
        ("1e3", Target(size=1000)),
        (".5MB", Target(size=500_000)),
    ],
)
def test_sizes(text: str, expected: Target) -> None:
    assert Target.parse(size=text) == expected


@pytest.mark.parametrize(
    "text", ["", "ten", "10y", "-5kB", "5 k B", "10 xx", "0x", "0", "1kb", "5kiB", "1e400", "nan", "10x20kB"]
)
def test_bad_sizes_are_told_what_is_understood(text: str) -> None:
    with pytest.raises(UsageError, match=r"x|positive"):
        Target.parse(size=text)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0}, {"times": -1.0}, {"minutes": 0}, {"minutes": math.inf}, {"max_drop": -0.1}, {"max_drop": math.nan},
        {"times": math.nan}, {"size": 10, "times": 2},
    ],
)  # fmt: skip
def test_bad_values(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Target(**values)  # type: ignore[arg-type]


def test_parse_keeps_the_rest() -> None:
    target = Target.parse(size="10x", max_drop=0.0, minutes=3)
    assert target == Target(times=10, max_drop=0.0, minutes=3)
    assert json.loads(json.dumps(target.to_json())) == {"times": 10, "max_drop": 0.0, "minutes": 3}
    assert not target.empty
    assert Target.parse().empty
    assert not Target.parse(max_drop=0.0).empty


@given(original=st.integers(1, 10**12), times=st.floats(1e-3, 1e6))
def test_bytes_allowed(original: int, times: float) -> None:
    assert Target(times=times).bytes_allowed(original) == original / times
    assert Target(size=77).bytes_allowed(original) == 77
    assert Target().bytes_allowed(original) == math.inf
