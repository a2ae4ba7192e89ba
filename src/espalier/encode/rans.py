r"""Static interleaved rANS: many integer states in step, vectorised.

Paper    Duda. Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
         arithmetic coding. 2013. arXiv:1311.2540; lanes: Giesen. Interleaved entropy coders. 2014. arXiv:1402.3392
Formula  x <- floor(x / f_s) 2^14 + (x mod f_s) + c_s;   16 bits leave a state before it would reach 2^32
Departs  Lanes = payload / 1000 bytes, 1 to 1024, as each costs 4 bytes; all states end where they began, as a check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.encode.bits import Reader, varint
from espalier.encode.coder import Coder, Hint
from espalier.encode.symbols import Alphabet

Array = NDArray[Any]
SCALE = 14  # bits of a frequency
LARGEST = 1 << 12  # symbols
START = 1 << 16  # every state begins (encoder) and ends (decoder) here
LANES = 1024


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``counts`` (1-D, some positive) scaled to sum ``2**SCALE``, at least 1 wherever a count is positive."""
    scaled = np.where(counts > 0, np.maximum(1, counts * (1 << SCALE) // counts.sum()), 0)
    surplus = int(scaled.sum()) - (1 << SCALE)
    while surplus:
        largest = int(scaled.argmax())
        step = -surplus if surplus < 0 else min(surplus, max(1, int(scaled[largest]) // 8))
        scaled[largest] += step if surplus < 0 else -step
        surplus = int(scaled.sum()) - (1 << SCALE)
    return scaled


def encode(symbols: NDArray[np.int64], freq: NDArray[np.int64], lanes: int) -> bytes:
    """``symbols`` (1-D) as final states (uint32 per lane), then 16-bit words in the order the decoder wants them."""
    start = np.cumsum(freq) - freq
    states = np.full(lanes, START, dtype=np.uint64)
    words: list[Array] = []
    for first in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        step = symbols[first : first + lanes]
        f = freq[step].astype(np.uint64)
        x = states[: step.size]
        full = x >= (f << np.uint64(32 - SCALE))
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: step.size] = ((x // f) << np.uint64(SCALE)) + x % f + start[step].astype(np.uint64)
    return states.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def decode(data: bytes, freq: NDArray[np.int64], lanes: int, count: int) -> NDArray[np.int64]:
    """Inverse of :func:`encode`. Raises ``Corrupt`` unless words and states come out even."""
    if len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
        raise Corrupt(f"a rANS stream of {len(data)} bytes cannot hold {lanes} states and whole words")
    states = np.frombuffer(data, dtype="<u4", count=lanes).astype(np.uint64)
    words = np.frombuffer(data, dtype="<u2", offset=4 * lanes).astype(np.uint64)
    owner = np.repeat(np.arange(freq.size), freq)
    width = freq[owner].astype(np.uint64)
    offset = np.arange(1 << SCALE, dtype=np.uint64) - (np.cumsum(freq) - freq)[owner].astype(np.uint64)
    out = np.empty(count, dtype=np.int64)
    at = 0
    for first in range(0, count, lanes):
        x = states[: min(lanes, count - first)]
        slot = (x & np.uint64((1 << SCALE) - 1)).astype(np.int64)
        out[first : first + lanes] = owner[slot]
        x = width[slot] * (x >> np.uint64(SCALE)) + offset[slot]
        empty = x < np.uint64(START)
        wanted = int(np.count_nonzero(empty))
        if at + wanted > words.size:
            raise Corrupt("a rANS stream ends before its symbols do")
        x[empty] = (x[empty] << np.uint64(16)) | words[at : at + wanted]
        at += wanted
        states[: x.size] = x
    if at != words.size or (states != START).any():
        raise Corrupt("a rANS stream does not end in its starting states")
    return out


@dataclass(frozen=True, kw_only=True)
class Rans(Coder):
    """Integers, fast in NumPy, within 1 % of the order-0 entropy.

    Blob: alphabet; number of lanes; frequency of each symbol; states; words.
    """

    id: ClassVar[str] = "rans"

    def encode(self, values: Array, _hint: Hint | None = None) -> bytes | None:
        alphabet = Alphabet.of(values, None) if values.size else None
        if alphabet is None or alphabet.last >= LARGEST:
            return None
        symbols = alphabet.symbols(values).ravel()
        counts = np.bincount(symbols, minlength=alphabet.last + 1)
        freq = frequencies(counts)
        bits = sum(int(c) * (SCALE - math.log2(int(f))) for c, f in zip(counts, freq, strict=True) if c)
        lanes = min(LANES, max(1, int(bits / 8000)))
        table = b"".join(varint(int(f)) for f in freq)
        return alphabet.write() + varint(lanes) + table + encode(symbols, freq, lanes)

    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        reader = Reader(data)
        alphabet = Alphabet.read(reader, dtype)
        lanes = reader.varint(LANES)
        if alphabet.last >= LARGEST or lanes == 0 or alphabet.moved:
            raise Corrupt(f"a rANS table of {alphabet.last + 1} symbols and {lanes} lanes is not allowed")
        freq = np.array([reader.varint(1 << SCALE) for _ in range(alphabet.last + 1)], dtype=np.int64)
        if int(freq.sum()) != 1 << SCALE:
            raise Corrupt(f"rANS frequencies add up to {int(freq.sum())}, not {1 << SCALE}")
        return alphabet.values(decode(reader.rest(), freq, lanes, math.prod(shape)), dtype).reshape(shape)
