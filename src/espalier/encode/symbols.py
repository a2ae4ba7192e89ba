"""Integer arrays as symbols 0..last: the common first step of every integer coder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.encode.bits import Reader, unzigzag, varint, zigzag
from espalier.encode.coder import Hint, in_range

Array = NDArray[Any]
LARGEST = (1 << 16) - 1  # symbols above this are left to the byte planes


@dataclass(frozen=True)
class Alphabet:
    """``symbol = code - low`` in 0..``last``; ``zero`` the symbol of a pruned weight; ``moved``: see ``Hint``."""

    low: int
    last: int
    zero: int
    moved: bool = False

    @classmethod
    def of(cls, values: Array, hint: Hint | None) -> Alphabet | None:
        """The alphabet of integer ``values`` (not empty), or None where they are floats or spread too far."""
        if values.dtype.kind not in "iub":
            return None
        low, high = int(values.min()), int(values.max())
        if high - low > LARGEST:
            return None
        if hint is not None and hint.negatives is not None and low == 0 and hint.zero == 0:
            return cls(0, high, min(hint.negatives, high), moved=True)
        if hint is not None and low <= hint.zero <= high:
            return cls(low, high - low, hint.zero - low)
        counts = np.bincount((values.astype(np.int64) - low).ravel())
        return cls(low, high - low, int(counts.argmax()))

    def symbols(self, values: Array) -> NDArray[np.int64]:
        """``values`` as symbols in value order, same shape."""
        found = values.astype(np.int64) - self.low
        if self.moved:
            found = np.where(found == 0, self.zero, found - (found <= self.zero))
        return found

    def values(self, symbols: Array, dtype: np.dtype[Any]) -> Array:
        """Inverse of :meth:`symbols`; ``symbols`` are within 0..last."""
        found = symbols
        if self.moved:
            found = np.where(found == self.zero, 0, found + (found < self.zero))
        return (found + self.low).astype(dtype)

    def write(self) -> bytes:
        """Three varints: low with its sign, last with the moved flag, zero."""
        return varint(zigzag(self.low)) + varint(2 * self.last + self.moved) + varint(self.zero)

    @classmethod
    def read(cls, reader: Reader, dtype: np.dtype[Any]) -> Alphabet:
        """Inverse of :meth:`write`; raises ``Corrupt`` where the codes do not fit ``dtype``."""
        low, last = unzigzag(reader.varint(1 << 65)), reader.varint(2 * LARGEST + 1)
        found = cls(low, last >> 1, reader.varint(last >> 1), moved=bool(last & 1))
        if dtype.kind not in "iub" or (found.moved and low != 0):
            raise Corrupt(f"integer codes cannot be read as {dtype} from {low}")
        in_range(found.low, found.last, dtype)
        return found
