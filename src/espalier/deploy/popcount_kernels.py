"""The compiled part of ``popcount.py``; importing it needs numba.

The inner loop is written in LLVM's own vectors of eight words: where the processor has a popcount of vectors, each
becomes one instruction, and elsewhere LLVM spells it out.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
WORD = 64
LANES = 8
"""Output pixels of one vector, and outputs that are counted in one go."""
TILE, BLOCK = 64, 64
"""Output pixels and outputs that one thread takes at a time."""
PART = 512
"""Input pixels that one thread packs at a time."""


@intrinsic  # type: ignore[misc, untyped-decorator, unused-ignore]
def count_block(_: Any, rows: Any, weight: Any, p: Any, o: Any, differ: Any) -> Any:  # noqa: ARG001 - by position
    """differ[i, p + j] = sum over k of popcount(rows[k, p + j] ^ weight[o + i, k]) for i, j in 0..7.

    All three are uint64, C-ordered and 2-D.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, weight, differ = (
            context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 1, 4)
        )  # fmt: skip
        p, o = arguments[2:4]
        word = ir.IntType(64)
        vector = ir.VectorType(word, LANES)
        popcount = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call, unused-ignore]
            builder.module, ir.FunctionType(vector, [vector]), f"llvm.ctpop.v{LANES}i64"
        )

        def at(array: Any, row: Any, column: Any) -> Any:
            width = builder.extract_value(array.shape, 1)
            return builder.gep(array.data, [builder.add(builder.mul(row, width), column)])

        def lanes_at(array: Any, row: Any) -> Any:
            return builder.bitcast(at(array, row, p), vector.as_pointer())

        sums = [cgutils.alloca_once(builder, vector) for _ in range(LANES)]  # type: ignore[no-untyped-call, unused-ignore]
        for each in sums:
            builder.store(ir.Constant(vector, [0] * LANES), each)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        with cgutils.for_range(builder, builder.extract_value(rows.shape, 0)) as loop:
            lanes = builder.load(lanes_at(rows, loop.index), align=8)
            for i, each in enumerate(sums):
                one = builder.load(at(weight, builder.add(o, ir.Constant(o.type, i)), loop.index))
                same = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
                same = builder.shuffle_vector(same, undefined, everywhere)
                found = builder.call(popcount, [builder.xor(lanes, same)])
                builder.store(builder.add(builder.load(each), found), each)
        for i, each in enumerate(sums):
            builder.store(builder.load(each), lanes_at(differ, ir.Constant(o.type, i)), align=8)
        return context.get_dummy_value()

    return types.void(rows, weight, types.intp, types.intp, differ), generate


@numba.njit(parallel=True, nogil=True, cache=True)  # type: ignore[misc, untyped-decorator, unused-ignore]
def pack_input(x: Array, words: Array) -> None:
    """Float32 (batch, channels, pixels) -> uint64 (batch, words, pixels), which comes as zeros."""
    batch, channels, pixels = x.shape
    parts = (pixels + PART - 1) // PART
    for job in numba.prange(batch * words.shape[1] * parts):
        n, word, first = job // parts // words.shape[1], job // parts % words.shape[1], job % parts * PART
        into = words[n, word, first : min(pixels, first + PART)]
        for bit in range(min(WORD, channels - word * WORD)):
            values, place = x[n, word * WORD + bit, first : min(pixels, first + PART)], np.uint64(bit)
            for p in range(len(into)):
                into[p] |= np.uint64(values[p] >= 0) << place


@numba.njit(parallel=True, nogil=True, cache=True)  # type: ignore[misc, untyped-decorator, unused-ignore]
def multiply(
    x: Array, weight: Array, ones: Array, scale: Array, bias: Array, channels: int, geometry: Any, found: Array
) -> None:
    """The words under a tile of output pixels side by side, against the words of each output in turn.

    ``x``: uint64 (batch, words, input pixels); ``weight``: uint64 (outputs rounded up to 8, places x words);
    ``ones``: int64 (places, outputs); ``found``: float32 (batch, outputs, output pixels).
    """
    in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w = geometry
    per_place, outputs, count = x.shape[1], found.shape[1], weight.shape[1]
    pixels, places = out_h * out_w, kernel_h * kernel_w
    tiles, blocks = (pixels + TILE - 1) // TILE, (outputs + BLOCK - 1) // BLOCK
    for job in numba.prange(x.shape[0] * tiles * blocks):
        n, first, begin = job // blocks // tiles, job // blocks % tiles * TILE, job % blocks * BLOCK
        lanes, end = min(TILE, pixels - first), min(outputs, begin + BLOCK)
        rows = np.zeros((count, TILE), np.uint64)
        base = np.zeros(TILE, np.int64)
        edges = 0  # lanes with places outside the image; number of each, and the ones of the weight at these places
        edge_of = np.full(TILE, -1, np.int64)
        edge_lane = np.empty(TILE, np.int64)
        excess = np.zeros((TILE, BLOCK), np.uint64)
        p = 0
        while p < lanes:  # a run of output pixels in one line of the image
            line, column = (first + p) // out_w, (first + p) % out_w
            run = min(lanes - p, out_w - column)
            for place in range(places):
                y, shift = line * stride_h - pad_h + place // kernel_w, place % kernel_w - pad_w
                low, high = 0, 0  # of the run, those that are inside
                if 0 <= y < in_h:
                    low = min(run, max(0, (stride_w - 1 - shift) // stride_w - column))
                    high = max(low, min(run, (in_w - 1 - shift) // stride_w + 1 - column))
                start = y * in_w + column * stride_w + shift
                for word in range(per_place):
                    row = rows[place * per_place + word]
                    if stride_w == 1:
                        for c in range(low, high):
                            row[p + c] = x[n, word, start + c]
                    else:
                        for c in range(low, high):
                            row[p + c] = x[n, word, start + c * stride_w]
                for c in range(run):
                    if low <= c < high:
                        base[p + c] += channels
                        continue
                    if edge_of[p + c] < 0:
                        edge_of[p + c], edge_lane[edges] = edges, p + c
                        edges += 1
                    more, there = excess[edge_of[p + c]], ones[place, begin:end]
                    for o in range(end - begin):
                        more[o] += np.uint64(there[o])
            p += run
        differ = np.empty((LANES, TILE), np.uint64)
        for o in range(begin, end, LANES):
            for p in range(0, lanes, LANES):
                count_block(rows, weight, p, o, differ)  # type: ignore[call-arg, unused-ignore]
            for i in range(min(LANES, end - o)):
                counted, results = differ[i], found[n, o + i, first : first + lanes]
                for e in range(edges):  # a word of zeros differs from the weight wherever that has a one
                    counted[edge_lane[e]] -= excess[e, o + i - begin]
                factor, offset = scale[o + i], bias[o + i]
                for p in range(lanes):
                    results[p] = np.float32(base[p] - 2 * np.int64(counted[p])) * factor + offset
