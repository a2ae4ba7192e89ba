"""Bounded reading and writing of the small things in a blob: varints, packed integers, inflated bytes."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt

Array = NDArray[Any]


def varint(value: int) -> bytes:
    """``value`` >= 0 in base 128, least significant group first (LEB128)."""
    out = bytearray()
    while value > 127:
        out.append(128 | (value & 127))
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """A signed integer as an unsigned one: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """Inverse of :func:`zigzag`."""
    return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)


class Reader:
    """A cursor over untrusted bytes. Every read is checked: past the end raises ``Corrupt``."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count < 0 or self.at + count > len(self.data):
            raise Corrupt(f"a blob of {len(self.data)} bytes ends where {count} more bytes after {self.at} were due")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self, limit: int) -> int:
        """The next varint; ``Corrupt`` above ``limit`` or when written longer than needed."""
        value = shift = 0
        while True:
            group = self.byte()
            value |= (group & 127) << shift
            shift += 7
            if group < 128:
                break
            if shift > 70:
                raise Corrupt("a number in a blob is longer than ten bytes")
        if value > limit or (group == 0 and shift > 7):
            raise Corrupt(f"a number in a blob is {value}; at most {limit} is allowed here, in its shortest form")
        return value

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(len(self.data) - self.at)

    def done(self) -> None:
        """Raise ``Corrupt`` unless every byte was read."""
        if self.at != len(self.data):
            raise Corrupt(f"{len(self.data) - self.at} bytes are left over at the end of a blob")


def pack(values: Array, width: int) -> bytes:
    """Unsigned integers (1-D), ``width`` bits each, most significant bit first; the last byte is zero padded."""
    if width == 0 or values.size == 0:
        return b""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    bits = (values.astype(np.uint64)[:, None] >> shifts) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8).ravel()).tobytes()


def unpack(data: bytes, width: int, count: int) -> NDArray[np.uint64]:
    """Inverse of :func:`pack`: ``count`` integers; ``Corrupt`` for another length or set padding."""
    if len(data) != (width * count + 7) // 8:
        raise Corrupt(f"{count} integers of {width} bits need {(width * count + 7) // 8} bytes, got {len(data)}")
    if width == 0 or count == 0:
        return np.zeros(count, dtype=np.uint64)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if bits[width * count :].any():
        raise Corrupt("the padding after packed integers is not zero")
    out = np.zeros(count, dtype=np.uint64)
    for column in bits[: width * count].reshape(count, width).T:
        out = (out << np.uint64(1)) | column.astype(np.uint64)
    return out


def deflate(data: bytes, dictionary: bytes = b"") -> bytes:
    """Raw deflate at the highest level."""
    squeezer = zlib.compressobj(
        9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, *([dictionary] if dictionary else [])
    )
    return squeezer.compress(data) + squeezer.flush()


def inflate_prefix(data: bytes, size: int, dictionary: bytes = b"") -> tuple[bytes, bytes]:
    """Raw inflate to exactly ``size`` bytes, never more memory than that, and what follows the stream.

    Raises ``Corrupt`` for anything else.
    """
    inflater = zlib.decompressobj(-15, zdict=dictionary) if dictionary else zlib.decompressobj(-15)
    try:
        out = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise Corrupt(f"a deflated part is damaged: {error}") from error
    if len(out) != size or not inflater.eof:
        raise Corrupt(f"a deflated part does not inflate to exactly {size} bytes")
    return out, inflater.unused_data


def inflate(data: bytes, size: int) -> bytes:
    """Raw inflate of all of ``data`` to exactly ``size`` bytes; ``Corrupt`` for anything else."""
    out, tail = inflate_prefix(data, size)
    if tail:
        raise Corrupt(f"{len(tail)} bytes are left over after a deflated part")
    return out
