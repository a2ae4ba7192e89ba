r"""Adaptive binary range coder with neighbourhood contexts and logistic mixing.

Paper    Wiedemann et al. DeepCABAC: A Universal Compression Algorithm for Deep Neural Networks. IEEE JSTSP 2020.
         arXiv:1907.11900; mixing: Mahoney. Adaptive Weighing of Context Models for Lossless Data Compression. 2005.
Formula  weight = flag (zero?), sign, magnitude by a binary tree in value order;   p = squash(sum_i w_i stretch(p_i))
         w_i += rate (bit - p) stretch(p_i);   p_i += (bit - p_i) / (n_i + 1.6)
Departs  Integers only. Contexts: running density of row and column, nine neighbours (left, above, and at a stored
         distance: one pixel row of an image layer, one kernel row of a convolution), their signs and magnitudes, the
         column's mean magnitude. DeepCABAC has one context per bit and chooses the quantisation; here codes are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.encode.bits import Reader, varint
from espalier.encode.coder import Coder, Hint
from espalier.encode.compiled import kernel
from espalier.encode.context_model import BY_COLUMN, COLUMNS, DENSE, INPUTS, MIX_SETS, ORDER0, STATES
from espalier.encode.symbols import Alphabet

Array = NDArray[Any]
CHUNK = 1 << 22  # symbols per independently coded chunk (at least one row)
SAMPLE = 1 << 18  # symbols on which stride and, for large planes, view are tried
WHOLE = 1 << 19  # largest plane coded in every view
MIXED = 1 << 20  # largest plane that is mixed by default: without numba mixing decodes about 0.25 M weights/s
MOST_PER_BYTE = 20_000  # symbols: no flag costs less than 0.00048 bits
_SIGMOID = (22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743)
_DENSITIES = (4, 8, 16, 28, 44, 64, 90, 120, 160, 200, 256, 320, 400, 460)  # class borders, in 1/512
_MEANS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 720, 1024, 1440)  # class borders, in 1/16 magnitude step


@cache
def tables() -> dict[str, tuple[int, ...]]:
    """The constant tables, by integer arithmetic alone: the same on every machine.

    ``squash``: 1 / (1 + exp(-x / 256)) in 1/65536 for x = -2048..2047, between 33 points linearly;
    ``stretch``: its inverse over 4096 probabilities.
    """
    points = [*_SIGMOID, 32768, *(65536 - p for p in reversed(_SIGMOID))]
    squash = [(points[i >> 7] * (128 - (i & 127)) + points[(i >> 7) + 1] * (i & 127)) >> 7 for i in range(4096)]
    stretch, x = [], 1
    for p in range(4096):
        while x < 4095 and squash[x] < 16 * p + 8:
            x += 1
        stretch.append(x - 2048)
    return {
        "stretch": tuple(stretch),
        "squash": tuple(squash),
        "rate": tuple(655360 // (10 * n + 16) for n in range(STATES)),
        "level": tuple(sum(i > border for border in _DENSITIES) for i in range(512)),
        "bucket": tuple(sum(i > border for border in _MEANS) for i in range(2048)),
    }


@cache
def _constants(*, as_arrays: bool) -> tuple[Any, ...]:
    found = (tables()[name] for name in ("stretch", "squash", "rate", "level", "bucket"))
    return tuple(np.array(table, dtype=np.int64) for table in found) if as_arrays else tuple(map(list, found))


def transcode_plane(
    plane: NDArray[np.int64],
    data: bytes | None,
    alphabet: Alphabet,
    stride: int,
    prior: int,
    *,
    mixing: bool,
    compiled: bool | None = None,
) -> bytes:
    """Encode ``plane`` (2-D, symbols; ``data`` None) to the returned bytes, or decode ``data`` into ``plane``.

    ``prior`` 0..255: the expected density of non-zeros in 1/256. Raises ``Corrupt`` for damaged ``data``.
    """
    rows, cols = plane.shape
    code, full, machine = kernel(plane.size, compiled=compiled)
    top = max(alphabet.zero, alphabet.last - alphabet.zero)
    grade = [min(7, size.bit_length()) for size in range(top + 1)]
    symbols: Any = plane.ravel() if machine else plane.ravel().tolist()
    room = 64 + plane.size * (2 + top.bit_length()) // 6
    first = 256 * prior + 128
    at = -1
    while at == -1:
        prob = full(COLUMNS + 2 * cols, 32768)
        prob[ORDER0], prob[DENSE:BY_COLUMN] = first, full(BY_COLUMN - DENSE, first)
        prob[COLUMNS : COLUMNS + cols] = full(cols, first)
        padded = bytearray(room) if data is None else bytearray(data) + bytes(5)
        at = code(
            data is not None, symbols, np.frombuffer(padded, dtype=np.uint8) if machine else padded, rows, cols,
            alphabet.zero, alphabet.last, max(0, top - 1).bit_length(), stride, mixing,
            prob, full(len(prob), 0), full(INPUTS * MIX_SETS, 14000), full(cols + stride + 2, 0),
            full(cols + stride + 2, 0), full(cols, 0), full(cols, 0), np.array(grade) if machine else grade,
            *_constants(as_arrays=machine),
        )  # fmt: skip
        if data is not None:
            break
        room *= 2
    if data is None:
        keep = at
        while keep > at - 5 and padded[keep - 1] == 0:
            keep -= 1
        return bytes(padded[:keep])
    if at < len(data) or (at < len(data) + 5 and data and data[-1] == 0):
        raise Corrupt(f"an adaptive stream of {len(data)} bytes does not end where its symbols end")
    if not machine:
        plane[...] = np.array(symbols, dtype=np.int64).reshape(rows, cols)
    return b""


def views(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """The orders in which a tensor may be scanned: ``(axes, rows)`` of the transposed array seen as a matrix.

    First the first axis (outputs) by the rest, then the second axis (inputs) by the rest.
    """
    axes = tuple(range(len(shape)))
    if len(shape) < 2:
        return [(axes, 1)]
    return [(axes, shape[0]), ((1, 0, *axes[2:]), shape[1])]


def strides(plane: NDArray[np.int64], zero: int, kernel_row: int) -> list[int]:
    """Distances (2..255) at which a neighbour may tell something: a kernel's row, else 2 and the clearest period."""
    if kernel_row > 2:
        return [min(kernel_row, 255)]
    if plane.size < 256:
        return [2]
    flags = plane.ravel()[: 1 << 17] != zero
    together = [int(np.count_nonzero(flags[d:] & flags[:-d])) if d < flags.size else 0 for d in range(2, 66)]
    peaks = [2 * together[i] - together[i - 1] - together[i + 1] for i in range(1, len(together) - 1)]
    clear = max(peaks) * 3 // 4  # multiples of a period peak as well: take the first
    return [2, next(i for i, peak in enumerate(peaks) if peak >= clear) + 3]


def _chunks(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, cols))
    return (slice(start, start + step) for start in range(0, rows, step))


@dataclass(frozen=True, kw_only=True)
class Adaptive(Coder):
    """Integers and masks, smallest files; ``mixing`` (several contexts per bit) is 3 to 8 % smaller and 4x slower.

    Blob: alphabet; byte of view + 4 * mixing; byte of stride; byte of prior; length of each chunk but the last; chunks.
    """

    id: ClassVar[str] = "adaptive"
    mixing: Literal["auto", "on", "off"] = "auto"

    def encode(self, values: Array, hint: Hint | None = None) -> bytes | None:
        alphabet = Alphabet.of(values, hint) if values.size else None
        if alphabet is None:
            return None
        symbols = alphabet.symbols(values)
        mixing = self.mixing == "on" or (self.mixing == "auto" and values.size <= MIXED)
        prior = min(255, int(np.count_nonzero(symbols != alphabet.zero)) * 256 // symbols.size)

        def coded(plane: NDArray[np.int64], stride: int, *, mixing: bool = mixing) -> bytes:
            return transcode_plane(plane, None, alphabet, stride, prior, mixing=mixing)

        options = []
        for view in range(len(views(symbols.shape))):
            plane = _as_matrix(symbols, view)
            found = strides(plane, alphabet.zero, symbols.shape[-1] if symbols.ndim > 2 else 0)
            if len(found) > 1:
                found = [min(found, key=lambda stride: len(coded(_sample(plane), stride, mixing=False)))]
            options.append((view, found[0]))
        if symbols.size > WHOLE:  # otherwise every view is coded in full and the smallest kept
            options = [min(options, key=lambda o: len(coded(_sample(_as_matrix(symbols, o[0])), o[1])))]
        blobs = []
        for view, stride in options:
            plane = _as_matrix(symbols, view)
            parts = [coded(plane[rows], stride) for rows in _chunks(*plane.shape)]
            lengths = b"".join(varint(len(part)) for part in parts[:-1])
            blobs.append(alphabet.write() + bytes([view + 4 * mixing, stride, prior]) + lengths + b"".join(parts))
        return min(blobs, key=len)

    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        reader = Reader(data)
        alphabet = Alphabet.read(reader, dtype)
        view, stride, prior = reader.take(3)
        mixing, view = view >= 4, view % 4 if view < 8 else 8
        if view >= len(views(shape)) or stride < 2 or 0 in shape:
            raise Corrupt(f"view {view}, stride {stride} cannot scan a tensor of shape {shape}")
        if math.prod(shape) > (len(data) + 64) * MOST_PER_BYTE:
            raise Corrupt(f"an adaptive stream of {len(data)} bytes cannot hold {math.prod(shape)} symbols")
        axes, rows = views(shape)[view]
        plane = np.zeros((rows, math.prod(shape) // rows), dtype=np.int64)
        chunks = list(_chunks(*plane.shape))
        lengths = [reader.varint(len(data)) for _ in chunks[:-1]]
        for chunk, length in zip(chunks, [*lengths, None], strict=True):
            part = reader.rest() if length is None else reader.take(length)
            transcode_plane(plane[chunk], part, alphabet, stride, prior, mixing=mixing)
        moved = alphabet.values(plane, dtype).reshape([shape[axis] for axis in axes])
        return np.ascontiguousarray(moved.transpose(np.argsort(axes))) if axes else moved.reshape(shape)


def _as_matrix(symbols: NDArray[np.int64], view: int) -> NDArray[np.int64]:
    axes, rows = views(symbols.shape)[view]
    return np.ascontiguousarray(symbols.transpose(axes)).reshape(rows, -1)


def _sample(plane: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.ascontiguousarray(plane[:: -(-plane.size // SAMPLE)])
