"""Steps that NumPy arrays and torch tensors take alike, bit for bit; for what their own methods do not offer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.core.structures.structure import Numbers

_GOLDEN, _FIRST, _SECOND = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def wide(values: Numbers) -> Numbers:
    """In float32 at least, where sums and products are the same everywhere."""
    if isinstance(values, np.ndarray):
        return values if values.dtype.itemsize >= 4 else values.astype(np.float32)
    return values if values.dtype.itemsize >= 4 else values.float()


def double(values: Numbers) -> Numbers:
    """In float64."""
    return values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()


def narrow(values: Numbers, like: Numbers) -> Numbers:
    """float64 ``values`` in the type of ``wide(like)``."""
    wanted = wide(like).dtype
    return values.astype(wanted) if isinstance(values, np.ndarray) else values.to(wanted)


def pick(values: Numbers, index: NDArray[Any], axis: int = -1) -> Numbers:
    """``numpy.take(values, index, axis)``; differentiable where ``values`` is a tensor."""
    if isinstance(values, np.ndarray):
        return values.take(index, axis)
    import torch

    flat = torch.from_numpy(np.require(index.reshape(-1), requirements=["C", "W"])).to(values.device)
    place = axis % values.ndim
    shape = (*values.shape[:place], *index.shape, *values.shape[place + 1 :])
    return values.index_select(place, flat).reshape(shape)


def contiguous(values: Numbers) -> Numbers:
    """In one piece, so that what multiplies by it takes the same way as with a weight that was read."""
    return np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values.contiguous()


def flipped(values: Numbers, signs: NDArray[Any]) -> Numbers:
    """``values * signs`` for signs of +1 and -1 that broadcast against them; exact."""
    if isinstance(values, np.ndarray):
        return values * signs.astype(values.dtype)
    import torch

    return values * torch.from_numpy(np.require(signs, requirements=["C", "W"])).to(values)


def hashes(count: int, seed: int) -> NDArray[np.uint64]:
    """One hash of 64 bits for each of 0 .. count - 1; the same on every machine (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * _FIRST) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
        return mixed ^ (mixed >> np.uint64(31))


def signs(count: int, seed: int) -> NDArray[np.int8]:
    """+1 or -1 for each of 0 .. count - 1: the top bit of its hash."""
    return np.where(hashes(count, seed) >> np.uint64(63), -1, 1).astype(np.int8)
