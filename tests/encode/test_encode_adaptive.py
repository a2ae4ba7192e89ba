"""The adaptive coder: one algorithm in Python and in machine code, chunks, views, hostile streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import Corrupt
from espalier.encode import adaptive, compiled
from espalier.encode.adaptive import Adaptive, strides, tables, transcode_plane, views
from espalier.encode.coder import Hint
from espalier.encode.symbols import Alphabet

from .support import sparse_indices

needs_numba = pytest.mark.skipif(not compiled.available(), reason="the compiled extra (numba) is not installed")


def _both(plane, alphabet, *, mixing, stride=2):
    return [
        transcode_plane(plane, None, alphabet, stride, 40, mixing=mixing, compiled=machine) for machine in (False, True)
    ]


@needs_numba
@pytest.mark.parametrize("mixing", [True, False])
@pytest.mark.parametrize(("zero", "last"), [(0, 1), (0, 15), (7, 15), (15, 15), (100, 255), (900, 2000), (0, 0)])
def test_python_and_machine_code_write_and_read_the_same_bytes(mixing, zero, last):
    rng = np.random.default_rng(last)
    plane = np.where(rng.random((40, 50)) < 0.3, rng.integers(0, last + 1, (40, 50)), zero)
    alphabet = Alphabet(0, last, zero)
    slow, fast = _both(plane, alphabet, mixing=mixing, stride=7)
    assert slow == fast
    for machine in (False, True):
        back = np.zeros_like(plane)
        transcode_plane(back, slow, alphabet, 7, 40, mixing=mixing, compiled=machine)
        assert (back == plane).all()


@needs_numba
@settings(max_examples=60)
@given(st.binary(min_size=0, max_size=40), st.booleans(), st.integers(0, 9), st.integers(0, 20))
def test_both_treat_hostile_bytes_alike(data, mixing, zero, more):
    alphabet = Alphabet(0, zero + more, zero)
    found = []
    for machine in (False, True):
        plane = np.zeros((6, 7), dtype=np.int64)
        try:
            transcode_plane(plane, data, alphabet, 3, 100, mixing=mixing, compiled=machine)
            found.append(plane.tolist())
        except Corrupt:
            found.append(None)
    assert found[0] == found[1]


def test_carries_run_through_long_chains():
    """Very predictable symbols, then surprises: the encoder's low end crosses many byte borders."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        plane = (rng.random((60, 60)) < 0.002 * (seed + 1)).astype(np.int64)
        alphabet = Alphabet(0, 1, 0)
        blob = transcode_plane(plane, None, alphabet, 2, 0, mixing=bool(seed % 2), compiled=False)
        back = np.zeros_like(plane)
        transcode_plane(back, blob, alphabet, 2, 0, mixing=bool(seed % 2), compiled=False)
        assert (back == plane).all()


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (4, 6, 3), (4, 6, 3, 3), (1, 1), (7, 1), (1, 7)])
def test_views_cover_every_element_once(shape):
    for axes, rows in views(shape):
        assert sorted(axes) == list(range(len(shape)))
        assert math.prod(shape) % rows == 0


def test_the_pixel_rows_of_an_image_layer_are_found():
    rng = np.random.default_rng(1)
    pixels = np.zeros((28, 28))
    pixels[8:20, 10:18] = 0.6
    plane = (rng.random((50, 784)) < pixels.ravel()).astype(np.int64)
    assert 28 in strides(plane, 0, 0)
    assert strides(plane, 0, 5) == [5]


def test_chunks_are_independent(monkeypatch):
    monkeypatch.setattr(adaptive, "CHUNK", 64)
    values = sparse_indices((30, 20), 0.2, 8, seed=2)
    blob = Adaptive().encode(values, Hint(0, 3))
    assert (Adaptive().decode(blob, values.dtype, values.shape) == values).all()
    with pytest.raises(Corrupt):
        Adaptive().decode(blob[:-6], values.dtype, values.shape)
    monkeypatch.setattr(adaptive, "CHUNK", 1 << 22)
    assert len(Adaptive().encode(values, Hint(0, 3))) < len(blob)


def test_samples_choose_view_and_stride_of_large_planes(monkeypatch):
    monkeypatch.setattr(adaptive, "SAMPLE", 512)
    monkeypatch.setattr(adaptive, "WHOLE", 1024)
    monkeypatch.setattr(adaptive, "MIXED", 1024)
    values = sparse_indices((64, 48), 0.2, 8, seed=2)
    blob = Adaptive().encode(values, Hint(0, 3))
    assert (Adaptive().decode(blob, values.dtype, values.shape) == values).all()


def test_a_tiny_stream_cannot_claim_a_huge_tensor():
    blob = Adaptive().encode(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(Corrupt, match="cannot hold"):
        Adaptive().decode(blob, np.dtype(np.uint8), (1 << 14, 1 << 14))


def test_the_longest_possible_run_still_fits_the_claim():
    plane = np.zeros((1, 300_000), dtype=np.int64)
    for mixing in (True, False):
        blob = transcode_plane(plane, None, Alphabet(0, 1, 0), 2, 0, mixing=mixing)
        assert plane.size < (len(blob) + 64) * adaptive.MOST_PER_BYTE
        assert plane.size > 4000 * len(blob)


def test_tables_are_what_they_say():
    found = tables()
    x = np.arange(-2048, 2048)
    assert np.abs(np.array(found["squash"]) - 65536 / (1 + np.exp(-x / 256))).max() < 700
    assert (np.diff(found["squash"]) >= 0).all()
    assert (np.diff(found["stretch"]) >= 0).all()
    assert max(abs(found["squash"][found["stretch"][p] + 2048] - 16 * p) for p in range(8, 4088)) < 200
    assert found["rate"][0] == 40960
    assert {max(found["level"]), max(found["bucket"])} == {14, 15}
