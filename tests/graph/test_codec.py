from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.core.errors import Corrupt, LimitExceeded
from espalier.graph.codec import Reader, Writer, deflate, inflate


@given(st.lists(st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(max_size=20))))
def test_values_come_back_exactly(values):
    writer = Writer()
    for value in values:
        {int: writer.signed, float: writer.real, str: writer.text}[type(value)](value)
    reader = Reader(bytes(writer.data))
    for value in values:
        again = {int: reader.signed, float: reader.real, str: lambda: reader.text(10_000)}[type(value)]()
        assert again == value
        assert type(again) is type(value)
        assert not isinstance(value, float) or math.copysign(1, again) == math.copysign(1, value)
    reader.end()


def test_floats_are_short():
    for value, most in ((1e-5, 2), (0.5, 2), (0.1, 2), (2.0, 2), (1e-12, 2)):
        writer = Writer()
        writer.real(value)
        assert len(writer.data) <= most


def test_not_a_number_comes_back():
    writer = Writer()
    writer.real(math.nan)
    assert math.isnan(Reader(bytes(writer.data)).real())


def test_bounded_inflate():
    assert inflate(deflate(b"abc" * 100), 300) == b"abc" * 100
    with pytest.raises(LimitExceeded):
        inflate(deflate(bytes(301)), 300)
    for damaged in (b"", deflate(b"abc")[:-1], deflate(b"abc") + b"x", b"\xff\xff"):
        with pytest.raises(Corrupt):
            inflate(damaged, 300)


def test_reading_past_the_end_and_leaving_bytes():
    with pytest.raises(Corrupt, match="ends in the middle"):
        Reader(b"").number()
    with pytest.raises(Corrupt, match="more than it has bytes"):
        Reader(b"\x05abc").text()
    with pytest.raises(Corrupt, match="follow the end"):
        Reader(b"\x00").end()
    with pytest.raises(Corrupt, match="UTF-8"):
        Reader(b"\x01\xff").text()
