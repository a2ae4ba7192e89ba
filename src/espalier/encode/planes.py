r"""Byte planes for float remainders: biases, scales, codebooks, layers kept as they are.

Paper    Hershcovitch et al. ZipNN: Lossless Compression for AI Models. 2024. arXiv:2411.05239 (byte grouping)
Formula  the k-th bytes of all values form plane k; each plane is the smallest of: as is, constant, deflated, rANS,
         adaptive
Departs  Two reversible views are tried first: sign moved to the last bit (exponents alone in a plane), and differences
         of neighbours in number order, which makes a sorted codebook cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.encode.adaptive import Adaptive
from espalier.encode.bits import Reader, deflate, inflate, varint
from espalier.encode.coder import Coder, Hint
from espalier.encode.rans import Rans

Array = NDArray[Any]
PLAIN, ROTATED, DIFFERENCES = range(3)  # views
AS_IS, CONSTANT, DEFLATED, RANS, ADAPTIVE = range(5)  # methods
_BYTES = np.dtype(np.uint8)
SMALL = 32  # bytes of the smallest plane that the adaptive coder can be worth its head for
LARGE, SAMPLE = 1 << 14, 1 << 13  # bytes of a plane judged by a sample first, and of the sample
NOISE = 7.98  # bits per byte: what is above is stored as it is, within 0.3 % of what a coder could do
TRIED = 1 << 16  # bytes of the largest plane the adaptive coder is tried on


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<u{dtype.itemsize}")


def forward(bits: Array, view: int) -> Array:
    """``bits`` (1-D unsigned words) in a view that codes well; :func:`backward` undoes it."""
    last = bits.dtype.type(8 * bits.dtype.itemsize - 1)
    one = bits.dtype.type(1)
    if view == ROTATED:
        bits = (bits << one) | (bits >> last)
    if view == DIFFERENCES:
        top = one << last
        ordered = np.where(bits & top, ~bits, bits | top)
        bits = np.diff(ordered, prepend=bits.dtype.type(0))
    return bits


def backward(words: Array, view: int) -> Array:
    """Inverse of :func:`forward`."""
    last = words.dtype.type(8 * words.dtype.itemsize - 1)
    one = words.dtype.type(1)
    if view == ROTATED:
        words = (words >> one) | (words << last)
    if view == DIFFERENCES:
        ordered = np.cumsum(words, dtype=words.dtype)
        top = one << last
        words = np.where(ordered & top, ordered & ~top, ~ordered)
    return words


def _entropy(sample: NDArray[np.uint8]) -> float:
    """Bits per byte of what the sample was drawn from, with the correction of Miller and Madow for its size."""
    counts = np.bincount(sample, minlength=256)
    share = counts[counts > 0] / sample.size
    return -float((share * np.log2(share)).sum()) + (share.size - 1) / (2 * sample.size * math.log(2))


def encode_plane(plane: NDArray[np.uint8], *, alone: bool) -> bytes:
    """One byte of method, then the plane (1-D, not empty) in the smallest way; ``alone``: an array of bytes, which
    the integer coders have been tried on already.
    """
    if (plane == plane[0]).all():
        return bytes([CONSTANT, int(plane[0])])
    raw = plane.tobytes()
    best = bytes([AS_IS]) + raw
    sample = plane if plane.size <= LARGE else plane[(plane.size - SAMPLE) // 2 :][:SAMPLE]
    deflated, counted = len(deflate(sample.tobytes())) * 8 / sample.size, _entropy(sample)
    noise = counted > NOISE and sample.size >= SAMPLE
    if noise and deflated >= 8:
        return best
    coders: list[tuple[int, Coder]] = []
    if not alone and not noise:
        coders = [(RANS, Rans())] if counted < deflated or plane.size < SAMPLE else []
        coders += [(ADAPTIVE, Adaptive())] if SMALL <= plane.size <= TRIED else []
    elif plane.size > LARGE and counted < deflated:
        coders = [(RANS, Rans())]
    squeezed = [(method, coder.encode(plane)) for method, coder in coders]
    if deflated <= counted or plane.size <= LARGE:
        squeezed.insert(0, (DEFLATED, deflate(raw)))
    options = [bytes([method]) + varint(len(blob)) + blob for method, blob in squeezed if blob is not None]
    return min([best, *options], key=len)


def decode_plane(reader: Reader, count: int) -> NDArray[np.uint8]:
    """Inverse of :func:`encode_plane` for ``count`` bytes."""
    method = reader.byte()
    if method == CONSTANT:
        return np.full(count, reader.byte(), dtype=np.uint8)
    if method == AS_IS:
        return np.frombuffer(reader.take(count), dtype=np.uint8)
    blob = reader.take(reader.varint(len(reader.data)))
    if method == DEFLATED:
        return np.frombuffer(inflate(blob, count), dtype=np.uint8)
    if method not in (RANS, ADAPTIVE):
        raise Corrupt(f"a byte plane names method {method}; 0 to {ADAPTIVE} are known")
    return (Rans() if method == RANS else Adaptive()).decode(blob, _BYTES, (count,))


def _planes(bits: Array, dtype: np.dtype[Any], view: int) -> list[NDArray[np.uint8]]:
    """One row of bytes per byte of the type, lowest first."""
    rows = np.ascontiguousarray(forward(bits, view).astype(dtype, copy=False)).view(np.uint8)
    return [np.ascontiguousarray(plane) for plane in rows.reshape(-1, dtype.itemsize).T]


def _promised(sample: Array, dtype: np.dtype[Any], view: int) -> float:
    """Bits per value that a view of the sample leaves, plane by plane."""
    planes = _planes(sample, dtype, view)
    return sum(min(_entropy(plane), len(deflate(plane.tobytes())) * 8 / plane.size) for plane in planes)


def _viewed(bits: Array, dtype: np.dtype[Any], view: int) -> bytes:
    """Byte of view, then the coded planes of ``bits`` seen that way."""
    alone = dtype.itemsize == 1
    return bytes([view]) + b"".join(encode_plane(plane, alone=alone) for plane in _planes(bits, dtype, view))


@dataclass(frozen=True, kw_only=True)
class Planes(Coder):
    """Any values, bit for bit. Blob: byte of view; one coded plane per byte of the type, lowest first."""

    id: ClassVar[str] = "planes"

    def encode(self, values: Array, _hint: Hint | None = None) -> bytes | None:
        if values.size == 0:
            return None
        dtype = _unsigned(values.dtype)
        bits = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).ravel().view(dtype)
        views = (PLAIN, ROTATED, DIFFERENCES) if dtype.itemsize > 1 else (PLAIN,)
        if len(views) > 1 and bits.size > LARGE:
            middle = bits[(bits.size - SAMPLE) // 2 :][:SAMPLE]
            views = (min(views, key=lambda view: _promised(middle, dtype, view)),)
        return min((_viewed(bits, dtype, view) for view in views), key=len)

    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        reader, count = Reader(data), math.prod(shape)
        view = reader.byte()
        if view > DIFFERENCES or count == 0:
            raise Corrupt(f"byte planes name view {view} for {count} values; views 0 to {DIFFERENCES} are known")
        planes = np.stack([decode_plane(reader, count) for _ in range(dtype.itemsize)], axis=1)
        reader.done()
        words = np.ascontiguousarray(planes).view(_unsigned(dtype)).ravel()
        bits = backward(words, view).astype(_unsigned(dtype), copy=False)
        if dtype.kind == "b":
            if bits.max() > 1:
                raise Corrupt("a boolean is neither 0 nor 1")
            return bits.astype(np.bool_).reshape(shape)
        return np.ascontiguousarray(bits).view(dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
