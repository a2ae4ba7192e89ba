"""The coders by name: what a file may name and an encoder may try."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt, UnknownNameError, did_you_mean
from espalier.encode.adaptive import Adaptive
from espalier.encode.coder import Coder, Hint
from espalier.encode.huffman import Huffman
from espalier.encode.packed import Packed
from espalier.encode.planes import Planes
from espalier.encode.rans import Rans

Array = NDArray[Any]
CODERS: tuple[type[Coder], ...] = (Adaptive, Rans, Huffman, Planes, Packed)
ALWAYS: tuple[Coder, ...] = (Planes(), Packed())
"""Tried whatever coders are asked for, because between them they can hold every array."""

_BY_NAME = {cls.id: cls() for cls in CODERS}


def resolve(coders: Iterable[str | Coder]) -> tuple[Coder, ...]:
    """The coders to try, named or as instances. Raises ``UnknownNameError``."""
    found = []
    for coder in coders:
        if isinstance(coder, str) and coder not in _BY_NAME:
            raise UnknownNameError(f"no coder is called {coder!r}.{did_you_mean(coder, _BY_NAME)}")
        found.append(_BY_NAME[coder] if isinstance(coder, str) else coder)
    return (*found, *ALWAYS)


def smallest(values: Array, coders: Iterable[Coder], hint: Hint | None = None) -> tuple[str, bytes]:
    """``(coder id, blob)`` of the smallest blob for ``values`` (not empty); the earlier coder wins a tie."""
    blobs = ((coder.id, coder.encode(values, hint)) for coder in coders)
    return min(((name, blob) for name, blob in blobs if blob is not None), key=lambda pair: len(pair[1]))


def decode(coder: str, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """The array that ``coder`` (a name out of a file) holds in ``data``; raises ``Corrupt``."""
    if coder not in _BY_NAME:
        raise Corrupt(f"a blob names the coder {coder!r}; known: {', '.join(_BY_NAME)}")
    try:
        return _BY_NAME[coder].decode(data, dtype, shape)
    except (ValueError, IndexError, OverflowError, TypeError) as error:
        raise Corrupt(f"a blob of coder {coder!r} for shape {shape} {dtype} is damaged: {error}") from error
