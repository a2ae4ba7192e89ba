"""Every coder: what goes in comes out, nothing more and nothing less is read."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from espalier.core.errors import Corrupt, FileError, UnknownNameError, UsageError
from espalier.encode.adaptive import Adaptive
from espalier.encode.coder import Hint
from espalier.encode.coders import CODERS, decode, resolve, smallest
from espalier.encode.huffman import Huffman
from espalier.encode.planes import Planes
from espalier.encode.rans import Rans

from .support import sparse_indices

ALL = [cls() for cls in CODERS] + [Adaptive(mixing="off"), Huffman(index_bits=5)]
DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "float16", "float32", "float64"]


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=9))
    if dtype.kind in "iu" and draw(st.booleans()):
        low = draw(st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) - 40))
        return draw(hnp.arrays(dtype, shape, elements=st.integers(low, low + 40)))
    return draw(hnp.arrays(dtype, shape))


@settings(max_examples=40)
@given(arrays())
def test_every_coder_gives_back_the_array_bit_for_bit(values):
    for coder in ALL:
        blob = coder.encode(values)
        if blob is None:
            continue
        back = coder.decode(blob, values.dtype, values.shape)
        assert back.dtype == values.dtype
        assert back.shape == values.shape
        assert back.tobytes() == values.tobytes()


@settings(max_examples=60)
@given(arrays(), st.integers(-3, 12), st.none() | st.integers(0, 50))
def test_a_wrong_hint_costs_bytes_but_never_the_data(values, zero, negatives):
    for coder in ALL:
        blob = coder.encode(values, Hint(zero, negatives))
        if blob is not None:
            assert coder.decode(blob, values.dtype, values.shape).tobytes() == values.tobytes()


@settings(max_examples=40)
@given(arrays())
def test_the_always_tried_coders_hold_every_array(values):
    name, blob = smallest(values, resolve(()))
    assert decode(name, blob, values.dtype, values.shape).tobytes() == values.tobytes()


@pytest.mark.parametrize("coder", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(1,), (), (30, 40), (2, 3, 4, 5), (70000,)])
def test_constant_planes_cost_next_to_nothing(coder, shape):
    blob = coder.encode(np.full(shape, 3, dtype=np.uint8))
    assert len(blob) < 40 + math.prod(shape) // 10000
    assert (coder.decode(blob, np.dtype(np.uint8), shape) == 3).all()


@pytest.mark.parametrize("coder", ALL, ids=repr)
def test_bytes_too_few_are_never_taken_for_the_whole(coder):
    """The tail of an arithmetic code stands for an interval: the last bytes may decode, but to something else."""
    values = sparse_indices((20, 30), 0.2, 16, seed=3)
    blob = coder.encode(values)
    read = 0
    for cut in range(len(blob)):
        try:
            assert (coder.decode(blob[:cut], values.dtype, values.shape) != values).any()
            read += 1
        except Corrupt:
            continue
    assert read <= (3 if isinstance(coder, Adaptive) else 0)


@pytest.mark.parametrize("coder", ALL, ids=repr)
def test_bytes_too_many_are_refused(coder):
    values = sparse_indices((20, 30), 0.2, 16, seed=3)
    with pytest.raises(Corrupt):
        coder.decode(coder.encode(values) + bytes(6), values.dtype, values.shape)


@settings(max_examples=150)
@given(
    st.sampled_from([c.id for c in CODERS]),
    st.binary(max_size=60),
    st.sampled_from(DTYPES),
    hnp.array_shapes(max_side=6),
)
def test_random_bytes_give_an_array_of_the_right_kind_or_a_typed_error(name, data, dtype, shape):
    try:
        found = decode(name, data, np.dtype(dtype), shape)
    except FileError:
        return
    assert found.shape == shape
    assert found.dtype == np.dtype(dtype)


@pytest.mark.parametrize("name", [c.id for c in CODERS])
def test_flipped_bits_give_an_array_of_the_right_kind_or_a_typed_error(name):
    values = sparse_indices((9, 14), 0.3, 16, seed=4)
    blob = next(c() for c in CODERS if c.id == name).encode(values)
    for at in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[at // 8] ^= 1 << at % 8
        with contextlib.suppress(FileError):
            assert decode(name, bytes(damaged), values.dtype, values.shape).shape == values.shape


def test_rans_is_within_one_percent_of_the_entropy():
    values = np.random.default_rng(0).geometric(0.2, 200_000).clip(1, 40).astype(np.uint8)
    counts = np.unique(values, return_counts=True)[1]
    entropy = float(-(counts * np.log2(counts / counts.sum())).sum() / 8)
    assert entropy < len(Rans().encode(values)) < 1.01 * entropy


@pytest.mark.parametrize("coder", [Rans(), Huffman(), Adaptive(mixing="off")], ids=lambda c: c.id)
def test_adaptive_beats_the_static_coders_where_there_is_structure(coder):
    values = sparse_indices((150, 200), 0.08, 16, seed=5)
    assert len(Adaptive().encode(values, Hint(0, 7))) < len(coder.encode(values, Hint(0, 7)))


def test_sorted_floats_cost_less_than_shuffled_ones():
    values = np.random.default_rng(1).normal(size=256).astype(np.float32)
    assert len(Planes().encode(np.sort(values))) < 0.85 * len(Planes().encode(values))


def test_an_unknown_coder_is_named_with_what_there_is():
    with pytest.raises(UnknownNameError, match="adaptive"):
        resolve(["adaptiv"])
    with pytest.raises(Corrupt, match="zip"):
        decode("zip", b"", np.dtype(np.uint8), (1,))
    with pytest.raises(UsageError, match="mixing"):
        Adaptive(mixing="sometimes")
