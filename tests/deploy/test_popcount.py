"""The popcount kernel gives what torch gives on the signs, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from espalier.core.errors import NeedError, UsageError
from espalier.deploy import popcount
from espalier.encode import compiled

needs_numba = pytest.mark.skipif(not compiled.available(), reason="the compiled extra (numba) is not installed")
Array = np.ndarray[Any, Any]


def values(seed: int, *shape: int) -> Array:
    """Normal values, some of them zero of either sign."""
    generator = np.random.default_rng(seed)
    found = generator.standard_normal(shape).astype(np.float32)
    found[generator.random(shape) < 0.1] = 0.0
    found[generator.random(shape) < 0.1] = -0.0
    return found


def signs(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.where(x >= 0, 1, -1).astype(np.float32))


@needs_numba
@given(
    batch=st.integers(1, 3), channels=st.sampled_from([1, 3, 63, 64, 65, 130]), outputs=st.sampled_from([1, 7, 8, 70]),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    threads=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_convolution_is_exact(
    batch: int, channels: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], threads: int,
) -> None:  # fmt: skip
    x, weight = values(0, batch, channels, *size), values(1, outputs, channels, *kernel)
    threads = min(threads, popcount.most_threads())
    found = popcount.conv2d(x, popcount.pack(weight), stride, padding, threads=threads)
    wanted = F.conv2d(signs(x), signs(weight), stride=stride, padding=padding).numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


@needs_numba
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 64, 10), (5, 100, 33), (70, 129, 8)])
def test_linear_is_exact(size: tuple[int, int, int]) -> None:
    batch, channels, outputs = size
    x, weight = values(0, batch, channels), values(1, outputs, channels)
    found = popcount.linear(x, popcount.pack(weight))
    assert np.array_equal(found, F.linear(signs(x), signs(weight)).numpy())


@needs_numba
def test_scale_and_bias_are_those_of_a_binary_weight_layer() -> None:
    """BWN's a and the bias on top of the integers: one rounding each, as torch does it on the integers."""
    x, weight, bias = values(0, 2, 32, 7, 7), values(1, 12, 32, 3, 3), values(2, 12)
    scale = np.abs(weight).mean((1, 2, 3))
    found = popcount.conv2d(x, popcount.pack(weight, scale, bias), padding=(1, 1))
    whole = F.conv2d(signs(x), signs(weight), padding=1)
    wanted = whole * torch.from_numpy(scale)[:, None, None] + torch.from_numpy(bias)[:, None, None]
    assert np.array_equal(found, wanted.numpy())
    scaled = signs(weight) * torch.from_numpy(scale)[:, None, None, None]
    layer = F.conv2d(signs(x), scaled, torch.from_numpy(bias), padding=1)
    assert np.allclose(found, layer.numpy(), atol=1e-4)
    flat = popcount.pack(weight[:, :, 0, 0], scale, bias)
    wanted = F.linear(signs(x[:, :, 0, 0]), signs(weight[:, :, 0, 0])) * torch.from_numpy(scale) + torch.from_numpy(
        bias
    )
    assert np.array_equal(popcount.linear(x[:, :, 0, 0], flat), wanted.numpy())


@needs_numba
def test_any_memory_layout() -> None:
    x, weight = values(0, 2, 6, 5, 40), values(1, 4, 6, 3, 3)
    turned = np.asfortranarray(x)
    assert np.array_equal(popcount.conv2d(turned, popcount.pack(weight)), popcount.conv2d(x, popcount.pack(weight)))


def test_signs_take_a_thirty_second() -> None:
    weight = values(0, 64, 128, 3, 3)
    assert popcount.pack(weight).nbytes * 32 == weight.nbytes


def test_what_does_not_fit_is_named() -> None:
    packed = popcount.pack(values(0, 4, 6, 3, 3))
    with pytest.raises(UsageError, match=r"\(4, 6, 3\)"):
        popcount.pack(values(0, 4, 6, 3))
    with pytest.raises(UsageError, match="one number per output"):
        popcount.pack(values(0, 4, 6), scale=np.ones(5, np.float32))
    with pytest.raises(UsageError, match=r"\(batch, 6, height, width\)"):
        popcount.conv2d(values(0, 1, 5, 8, 8), packed)
    with pytest.raises(UsageError, match="smaller than the kernel"):
        popcount.conv2d(values(0, 1, 6, 2, 2), packed)
    with pytest.raises(UsageError, match="without a kernel"):
        popcount.linear(values(0, 1, 6), packed)
    with pytest.raises(UsageError, match="threads"):
        popcount.conv2d(values(0, 1, 6, 8, 8), packed, threads=0)


@needs_numba
def test_more_threads_than_there_are() -> None:
    with pytest.raises(UsageError, match="at most"):
        popcount.conv2d(values(0, 1, 6, 8, 8), popcount.pack(values(0, 4, 6, 3, 3)), threads=10_000)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popcount, "available", lambda: False)
    with pytest.raises(NeedError, match=r"espalier\[compiled\]"):
        popcount.conv2d(values(0, 1, 6, 8, 8), popcount.pack(values(0, 4, 6, 3, 3)))
