r"""Relative indices and canonical Huffman codes: the file coder of Deep Compression.

Paper    Han, Mao, Dally. Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
         Huffman Coding. ICLR 2016. arXiv:1510.00149
Formula  non-zeros as (zeros before it, value) pairs; a run of 2^b zeros or more puts in a filler zero;
         gaps and values each get a Huffman code
Departs  The index width b is the one with the smallest blob, the paper fixes 8 (convolution) and 5 (fully connected);
         codes are canonical and at most 15 bits long.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.core.fields import Range
from espalier.encode.bits import Reader, deflate, inflate, varint
from espalier.encode.coder import Coder, Hint
from espalier.encode.symbols import Alphabet

Array = NDArray[Any]
LONGEST = 15  # bits of a code
WIDEST = 12  # bits of a relative index


def relative_indices(
    symbols: NDArray[np.int64], zero: int, index_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(gaps, values)`` of ``symbols`` (1-D): zeros before each coded value, fillers included (section 3)."""
    places = np.flatnonzero(symbols != zero)
    runs = np.diff(places, prepend=-1) - 1
    fillers = runs >> index_bits  # a filler is a zero itself: gap 2^b - 1 and the filler cover 2^b positions
    gaps = np.full(places.size + int(fillers.sum()), (1 << index_bits) - 1, dtype=np.int64)
    values = np.full(gaps.size, zero, dtype=np.int64)
    ends = np.cumsum(fillers + 1) - 1
    gaps[ends] = runs & ((1 << index_bits) - 1)
    values[ends] = symbols[places]
    return gaps, values


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Huffman code lengths in bits, 0 for absent symbols and for an only one; at most ``LONGEST``."""
    present = np.flatnonzero(counts)
    lengths = np.zeros(counts.size, dtype=np.int64)
    if present.size < 2:
        return lengths
    weights = [int(count) for count in counts[present]]
    while True:
        heap = [(weight, leaf) for leaf, weight in enumerate(weights)]
        heapq.heapify(heap)
        parent: dict[int, int] = {}
        for node in range(len(weights), 2 * len(weights) - 1):
            (w0, a), (w1, b) = heapq.heappop(heap), heapq.heappop(heap)
            parent[a] = parent[b] = node
            heapq.heappush(heap, (w0 + w1, node))
        depth = [0] * (2 * len(weights) - 1)
        for node in range(2 * len(weights) - 3, -1, -1):
            depth[node] = depth[parent[node]] + 1
        if max(depth) <= LONGEST:
            lengths[present] = depth[: len(weights)]
            return lengths
        weights = [weight // 2 + 1 for weight in weights]


def canonical(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The canonical code words of ``lengths``: by length, then by symbol. ``Corrupt`` unless they fill the tree."""
    used = np.flatnonzero(lengths)
    if used.size and int(np.sum(1 << (LONGEST - lengths[used]))) != 1 << LONGEST:
        raise Corrupt("Huffman code lengths do not make a complete code")
    order = used[np.lexsort((used, lengths[used]))]
    words = np.zeros(lengths.size, dtype=np.int64)
    step = 1 << (LONGEST - lengths[order])
    words[order] = (np.cumsum(step) - step) >> (LONGEST - lengths[order])
    return words


def encode_bits(symbols: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """``symbols`` in the canonical code of ``lengths``, most significant bit first, zero padded to bytes."""
    size, words = lengths[symbols], canonical(lengths)[symbols]
    if not size.any():
        return b""
    place = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    bits = (np.repeat(words, size) >> (np.repeat(size, size) - 1 - place)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def decode_bits(data: bytes, lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Inverse of :func:`encode_bits`: exactly ``count`` symbols and all of ``data``, else ``Corrupt``."""
    words = canonical(lengths)
    used = np.flatnonzero(lengths)
    if used.size == 0:
        raise Corrupt("a Huffman code has no symbols")
    order = used[np.lexsort((used, lengths[used]))]
    symbol_of = np.repeat(order, 1 << (LONGEST - lengths[order]))
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    padded = np.concatenate([bits, np.zeros(LONGEST, dtype=np.uint8)])
    window = np.zeros(bits.size, dtype=np.int64)
    for shift in range(LONGEST):
        window = (window << 1) | padded[shift : shift + bits.size]
    symbol_at = symbol_of[window]
    step = lengths[symbol_at].tolist()
    at, starts = 0, []
    for _ in range(count):
        if at >= len(step):
            raise Corrupt("a Huffman stream ends before its symbols do")
        starts.append(at)
        at += step[at]
    if at > bits.size or bits.size - at > 7 or bits[at:].any() or words.size == 0:
        raise Corrupt(f"a Huffman stream of {bits.size} bits ends after {at}")
    found: NDArray[np.int64] = symbol_at[np.array(starts, dtype=np.int64)]
    return found


def _stream(symbols: NDArray[np.int64], alphabet: int) -> bytes:
    """Code lengths (deflated bytes, or the only symbol), then the coded symbols."""
    counts = np.bincount(symbols, minlength=alphabet)
    only = np.flatnonzero(counts)
    if only.size == 1:
        return b"\0" + varint(int(only[0]))
    lengths = code_lengths(counts)
    table = deflate(lengths.astype(np.uint8).tobytes())
    coded = encode_bits(symbols, lengths)
    return varint(len(table)) + table + varint(len(coded)) + coded


def _read_stream(reader: Reader, alphabet: int, count: int) -> NDArray[np.int64]:
    size = reader.varint(len(reader.data))
    if size == 0:
        return np.full(count, reader.varint(alphabet - 1), dtype=np.int64)
    lengths = np.frombuffer(inflate(reader.take(size), alphabet), dtype=np.uint8).astype(np.int64)
    if lengths.max() > LONGEST:
        raise Corrupt(f"a Huffman code of {int(lengths.max())} bits; at most {LONGEST} are allowed")
    return decode_bits(reader.take(reader.varint(len(reader.data))), lengths, count)


@dataclass(frozen=True, kw_only=True)
class Huffman(Coder):
    """Sparse integers as the paper codes them; ``index_bits`` 0 tries all widths.

    Blob: alphabet; index width; number of pairs; Huffman stream of gaps; Huffman stream of values.
    """

    id: ClassVar[str] = "huffman"
    index_bits: Annotated[int, Range(0, WIDEST, "bits", "width of a relative index; 0 tries all")] = 0

    def encode(self, values: Array, hint: Hint | None = None) -> bytes | None:
        alphabet = Alphabet.of(values, hint) if values.size else None
        if alphabet is None:
            return None
        symbols = alphabet.symbols(values).ravel()
        blobs = []
        for width in [self.index_bits] if self.index_bits else range(1, WIDEST + 1):
            gaps, kept = relative_indices(symbols, alphabet.zero, width)
            body = _stream(gaps, 1 << width) + _stream(kept, alphabet.last + 1) if kept.size else b""
            blobs.append(alphabet.write() + bytes([width]) + varint(kept.size) + body)
        return min(blobs, key=len)

    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        reader, count = Reader(data), math.prod(shape)
        alphabet = Alphabet.read(reader, dtype)
        width, pairs = reader.byte(), reader.varint(count)
        if not 1 <= width <= WIDEST:
            raise Corrupt(f"relative indices of {width} bits; 1 to {WIDEST} are allowed")
        symbols = np.full(count, alphabet.zero, dtype=np.int64)
        if pairs:
            gaps = _read_stream(reader, 1 << width, pairs)
            kept = _read_stream(reader, alphabet.last + 1, pairs)
            places = np.cumsum(gaps + 1) - 1
            if int(places[-1]) >= count:
                raise Corrupt(f"relative indices reach {int(places[-1])} in a tensor of {count} elements")
            symbols[places] = kept
        reader.done()
        return alphabet.values(symbols, dtype).reshape(shape)


def deep_compression_bits(indices: Array, index_bits: int, *, zero: int = 0) -> dict[str, float]:
    """The columns of the paper's tables 2 to 4 for one index plane (any shape, ``zero`` = the pruned code).

    Fractions and bits per coded value, codebook excluded: ``kept`` (fraction), ``fillers``, ``value_bits`` and
    ``index_bits`` at fixed width, ``value_huffman`` and ``index_huffman`` after Huffman, and ``fixed_bytes``,
    ``huffman_bytes`` of the plane.
    """
    symbols = indices.astype(np.int64).ravel()
    kept = int(np.count_nonzero(symbols != zero))
    gaps, values = relative_indices(symbols, zero, index_bits)
    fixed = max(1, math.ceil(math.log2(max(2, np.unique(symbols[symbols != zero]).size))))

    def mean_length(stream: NDArray[np.int64]) -> float:
        counts = np.bincount(stream) if stream.size else np.ones(1, dtype=np.int64)
        return float((code_lengths(counts) * counts).sum() / counts.sum())

    value, index = mean_length(values), mean_length(gaps)
    return {
        "weights": symbols.size,
        "kept": kept / max(1, symbols.size),
        "fillers": int(values.size - kept),
        "value_bits": fixed,
        "index_bits": index_bits,
        "value_huffman": value,
        "index_huffman": index,
        "fixed_bytes": values.size * (fixed + index_bits) / 8,
        "huffman_bytes": values.size * (value + index) / 8,
    }
