r"""Bit-packed integers: what remains when a plane is too small or too flat for an entropy coder.

Paper    none
Formula  code = low + packed;   width = ceil(log2(high - low + 1)) bits
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.encode.bits import Reader, pack, unpack, unzigzag, varint, zigzag
from espalier.encode.coder import Coder, Hint, in_range

Array = NDArray[Any]
WIDEST = 32


@dataclass(frozen=True, kw_only=True)
class Packed(Coder):
    """Any integers within a range of 2^32; a constant costs its own bytes only. Blob: low; width; bits."""

    id: ClassVar[str] = "packed"

    def encode(self, values: Array, _hint: Hint | None = None) -> bytes | None:
        if values.dtype.kind not in "iub" or values.size == 0:
            return None
        low, high = int(values.min()), int(values.max())
        width = (high - low).bit_length()
        if width > WIDEST:
            return None
        return varint(zigzag(low)) + bytes([width]) + pack((values.astype(np.int64) - low).ravel(), width)

    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        reader = Reader(data)
        low, width = unzigzag(reader.varint(1 << 65)), reader.byte()
        if dtype.kind not in "iub" or width > WIDEST:
            raise Corrupt(f"integers of {width} bits cannot be read as {dtype}")
        in_range(low, 0, dtype)
        found = unpack(reader.rest(), width, math.prod(shape)).astype(np.int64) + low
        in_range(low, int(found.max()) - low if found.size else 0, dtype)
        return found.astype(dtype).reshape(shape)
