"""Bytes for plain values: variable-length integers, exact floats, texts; bounded reading of untrusted data."""

from __future__ import annotations

import math
import zlib

from espalier.core.errors import Corrupt, LimitExceeded

_MAX_BITS = 70
_SPECIAL = (math.inf, -math.inf, math.nan, -0.0)
_SPECIAL_EXPONENT = 500


class Writer:
    """Collects bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def number(self, value: int) -> None:
        """An integer >= 0, seven bits per byte, low bits first."""
        while value > 0x7F:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def signed(self, value: int) -> None:
        """An integer of either sign: 0, -1, 1, -2, 2 ... become 0, 1, 2, 3, 4 ..."""
        self.number(zigzag(value))

    def real(self, value: float) -> None:
        """A float as its shortest exact decimal: mantissa and power of ten."""
        special = [k for k, s in enumerate(_SPECIAL) if repr(s) == repr(value)]
        if special:
            self.signed(special[0])
            self.signed(_SPECIAL_EXPONENT)
            return
        head, _, power = repr(value).partition("e")
        whole, _, fraction = head.partition(".")
        digits = whole + fraction.rstrip("0")
        exponent = int(power or 0) - len(fraction.rstrip("0"))
        self.signed(int(digits))
        self.signed(exponent)

    def text(self, value: str) -> None:
        """A text as its UTF-8 length and bytes."""
        raw = value.encode()
        self.number(len(raw))
        self.data += raw


class Reader:
    """Reads what :class:`Writer` wrote; raises Corrupt instead of reading past the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        """The next byte."""
        if self.position >= len(self.data):
            raise Corrupt("The graph ends in the middle of a value.")
        self.position += 1
        return self.data[self.position - 1]

    def number(self, limit: int = 2**64) -> int:
        """An integer in 0..limit, in its one shortest form."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > _MAX_BITS:
                raise Corrupt("The graph holds an integer longer than 64 bits.")
        if byte == 0 and shift > 7:
            raise Corrupt("The graph holds an integer that is not in its shortest form.")
        if value > limit:
            raise Corrupt(f"The graph holds {value} where at most {limit} is allowed.")
        return value

    def count(self, limit: int) -> int:
        """A number of things that follow, each at least one byte long."""
        value = self.number(limit)
        if value > len(self.data) - self.position:
            raise Corrupt(f"The graph announces {value} entries, more than it has bytes.")
        return value

    def signed(self) -> int:
        """An integer of either sign."""
        return unzigzag(self.number())

    def real(self) -> float:
        """A float."""
        mantissa, exponent = self.signed(), self.signed()
        if exponent == _SPECIAL_EXPONENT and 0 <= mantissa < len(_SPECIAL):
            return _SPECIAL[mantissa]
        if abs(mantissa) >= 10**17 or abs(exponent) > 400:
            raise Corrupt(f"The graph holds the float {mantissa}e{exponent}.")
        value = float(f"{mantissa}e{exponent}")
        if math.isinf(value):
            raise Corrupt(f"The graph holds the float {mantissa}e{exponent}.")
        return value

    def text(self, limit: int = 512) -> str:
        """A text of at most ``limit`` bytes."""
        length = self.count(limit)
        raw = self.data[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise Corrupt("The graph holds a text that is not UTF-8.") from error

    def end(self) -> None:
        """Refuse bytes after the last value."""
        if self.position != len(self.data):
            raise Corrupt(f"{len(self.data) - self.position} bytes follow the end of the graph.")


def zigzag(value: int) -> int:
    """0, -1, 1, -2 ... as 0, 1, 2, 3 ..."""
    return value << 1 if value >= 0 else ~value << 1 | 1


def unzigzag(value: int) -> int:
    """The inverse of :func:`zigzag`."""
    return ~(value >> 1) if value & 1 else value >> 1


def deflate(data: bytes) -> bytes:
    """Raw deflate at the strongest level; the shorter of the default and the fixed Huffman tables."""
    candidates = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        candidates.append(packer.compress(data) + packer.flush())
    return min(candidates, key=len)


def inflate(data: bytes, limit: int) -> bytes:
    """The bytes :func:`deflate` packed, at most ``limit``. Raises Corrupt or LimitExceeded."""
    unpacker = zlib.decompressobj(-15)
    try:
        plain = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise Corrupt(f"The graph cannot be inflated: {error}.") from error
    if len(plain) > limit:
        raise LimitExceeded(f"The graph unpacks to more than {limit} bytes.")
    if not unpacker.eof or unpacker.unused_data:
        raise Corrupt("The graph's bytes are cut short or go on after its end.")
    return plain
