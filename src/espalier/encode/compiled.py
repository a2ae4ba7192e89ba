"""The adaptive kernel, compiled by numba where that is installed and the array is worth it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np

from espalier.encode.context_model import transcode

WORTH = 1 << 18  # symbols that must come by in a process before loading the compiled kernel pays

TINY = 1 << 11  # symbols of a plane that pure Python codes sooner than the compiled kernel takes its arguments

_seen = [0]  # symbols coded or announced so far in this process

Transcode = Callable[..., int]


@cache
def available() -> bool:
    """Whether the ``compiled`` extra (numba) is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def _machine_code() -> Transcode:
    import numba

    try:
        return cast("Transcode", numba.njit(cache=True)(transcode))
    except RuntimeError:  # no folder to cache in: compile once per process
        return cast("Transcode", numba.njit(transcode))


def announce(symbols: int) -> None:
    """Say that so many symbols are about to be coded: enough of them, and the compiled kernel is loaded at once."""
    _seen[0] += symbols


def kernel(symbols: int, *, compiled: bool | None = None) -> tuple[Transcode, Callable[[int, int], Any], bool]:
    """``(transcode, full, compiled)`` for a plane of ``symbols``; ``full(n, x)`` makes what that kernel indexes.

    ``compiled`` forces one of the two; by default numba is used where it is installed and pays.
    """
    announce(symbols)
    if compiled is None:
        compiled = available() and symbols >= TINY and _seen[0] >= WORTH
    if compiled:
        return _machine_code(), lambda count, value: np.full(count, value, dtype=np.int64), True
    return transcode, lambda count, value: [value] * count, False
