"""The paper's file format: relative indices, fillers, canonical codes, its table's columns."""

from __future__ import annotations

import heapq
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import Corrupt
from espalier.encode.huffman import (
    LONGEST,
    canonical,
    code_lengths,
    decode_bits,
    deep_compression_bits,
    encode_bits,
    relative_indices,
)


def test_figure_2_of_the_paper():
    """Positions 1, 4 and 15 at three index bits: gaps 1, 3, then a filler zero because 10 zeros are more than 7."""
    symbols = np.zeros(16, dtype=np.int64)
    symbols[[1, 4, 15]] = [34, 9, 17]
    gaps, values = relative_indices(symbols, 0, 3)
    assert values.tolist() == [34, 9, 0, 17]
    assert gaps.tolist() == [1, 2, 7, 2]
    assert (np.cumsum(gaps + 1) - 1).tolist() == [1, 4, 12, 15]


@settings(max_examples=60)
@given(st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), max_size=200), st.integers(1, 5))
def test_relative_indices_lead_back(symbols, width):
    array = np.array(symbols, dtype=np.int64)
    gaps, values = relative_indices(array, 0, width)
    back = np.zeros_like(array)
    places = np.cumsum(gaps + 1) - 1
    back[places] = values
    assert (back == array).all()
    assert (gaps < 1 << width).all()


def _huffman_cost(counts):
    """Total bits of an optimal prefix code: the sum of all merged weights."""
    heap = [c for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@settings(max_examples=60)
@given(st.lists(st.integers(0, 200), min_size=2, max_size=60))
def test_code_lengths_are_optimal_and_complete(counts):
    lengths = code_lengths(np.array(counts, dtype=np.int64))
    assert int((lengths * counts).sum()) == _huffman_cost(counts)
    if sum(c > 0 for c in counts) > 1:
        assert sum(Fraction(1, 2 ** int(n)) for n in lengths if n) == 1


def test_code_lengths_are_limited():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci, dtype=np.int64))
    assert lengths.max() == LONGEST
    canonical(lengths)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=300))
def test_bits_lead_back(symbols):
    array = np.array([*symbols, 0, 1], dtype=np.int64)
    lengths = code_lengths(np.bincount(array))
    assert (decode_bits(encode_bits(array, lengths), lengths, array.size) == array).all()


def test_padding_that_is_not_zero_is_refused():
    lengths = np.array([1, 1], dtype=np.int64)
    assert decode_bits(b"\x40", lengths, 2).tolist() == [0, 1]
    for data in (b"\x41", b"\x40\0"):
        with pytest.raises(Corrupt, match="ends after"):
            decode_bits(data, lengths, 2)


def test_incomplete_codes_are_refused():
    with pytest.raises(Corrupt, match="complete"):
        canonical(np.array([1, 2, 0], dtype=np.int64))
    with pytest.raises(Corrupt, match="complete"):
        canonical(np.array([1, 1, 1], dtype=np.int64))


def test_the_papers_columns_on_a_plane_counted_by_hand():
    indices = np.zeros(64, dtype=np.uint8)
    indices[[3, 40, 41]] = [1, 2, 1]
    found = deep_compression_bits(indices, 4)
    assert found["weights"] == 64
    assert found["kept"] == pytest.approx(3 / 64)
    assert found["fillers"] == 2  # 36 zeros between: two fillers of 16, then gap 4
    assert found["value_bits"] == 1
    assert found["fixed_bytes"] == 5 * (1 + 4) / 8
    assert found["value_huffman"] == pytest.approx((2 * 1 + 2 * 2 + 1 * 2) / 5)
    assert found["huffman_bytes"] <= found["fixed_bytes"] + 1
