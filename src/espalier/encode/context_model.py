r"""The integer heart of the adaptive coder: one function that both encodes and decodes.

It is written over plain indexing only, so that the same text runs as pure Python (over lists) and, when
numba is there, compiled (over int64 arrays): one algorithm, the same bytes. It is deliberately one long
function: a Python call per binary decision would double the decoding time, and one body for both
directions means that encoder and decoder cannot disagree.
"""

from __future__ import annotations

from typing import Any

Ints = Any
"""A list of Python ints or a NumPy int64 array: whatever indexes and assigns."""

# Slots of ``prob``: one adaptive probability each, 0..65535, that the next bit is one.
ORDER0, ROW, SIGN, ROW_SIGN, LAST_SIGN = 0, 1, 2, 3, 4  # LAST_SIGN has 3 slots
SIGNS, DENSE, NEAR, JOINT = 8, 36, 160, 672  # 27, 120, 512 and 3600 slots
BY_COLUMN, BY_ABOVE, BY_DENSITY, BY_LAST, PLAIN = 4352, 12544, 16640, 24832, 28928  # 512 slots per class
COLUMNS = 29440  # then one slot per column for the flag, and one per column for the sign

STATES = 256  # observations after which a probability stops adapting faster
TREE_BITS = 8  # deeper magnitude bits are stored as they are
MIX_SETS = 2 + TREE_BITS
INPUTS = 5


def transcode(
    decoding: bool,
    symbols: Ints,
    data: Ints,
    rows: int,
    cols: int,
    zero: int,
    last: int,
    depth: int,
    stride: int,
    mixing: bool,
    prob: Ints,
    seen: Ints,
    weights: Ints,
    above: Ints,
    here: Ints,
    mean: Ints,
    count: Ints,
    grade: Ints,
    stretch: Ints,
    squash: Ints,
    rate: Ints,
    level: Ints,
    bucket: Ints,
) -> int:
    """Code ``rows * cols`` symbols 0..``last`` in value order, ``zero`` being the one for "pruned".

    Decoding fills ``symbols`` from ``data`` (5 zero bytes follow the real ones); encoding fills ``data``.
    ``depth``: bits of a magnitude. ``above`` and ``here`` hold two rows of signed values with ``stride`` zeros
    before and one after; the remaining arrays are the model's state and its constant tables. Returns the bytes
    consumed or produced, -1 where ``data`` is too short (damaged when decoding, a small buffer when encoding).
    """
    end = len(data)
    column, column_sign, row = COLUMNS, COLUMNS + cols, ROW
    top = max(zero, last - zero)
    signed = zero > 0 and last > zero
    low, code, span, at = 0, 0, 1 << 40, 0
    if decoding:
        for _ in range(5):
            code = (code << 8) | data[at]
            at += 1
    position, last_sign, last_grade, target, want = 0, 0, 0, 0, 0
    bit, sign, rank, node, bits, left = 0, 0, 0, 0, 0, 0
    by_column, by_above, by_density, by_last, plain, s0, s1, s2, s3, s4 = 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    for _row in range(rows):
        prob[ROW], seen[ROW] = prob[ORDER0], 3
        prob[ROW_SIGN], seen[ROW_SIGN] = prob[SIGN], 3
        before, over, off, value = 0, 1 if above[stride] != 0 else 0, 0, 0
        for c in range(cols):
            here_at = c + stride
            before = ((before << 1) | (1 if value else 0)) & 7
            over = ((over << 1) | (1 if above[here_at + 1] else 0)) & 7
            off = ((off << 1) | (1 if here[c + 1] else 0)) & 7
            left, value, kind, sets, x2, x3 = value, 0, 0, 0, column + c, row
            dense = level[prob[x2] >> 7]
            if mixing:
                x0 = (DENSE + (before & 3) + ((over & 2) << 1)) + (dense << 3)
                x1, x4 = NEAR + before + (over << 3) + (off << 6), ORDER0
            else:
                x0 = (
                    (before & 3)
                    + ((over & 2) << 1)
                    + ((off & 2) << 2)
                    + ((dense * 15 + level[prob[ROW] >> 7]) << 4)
                    + JOINT
                )
                x1, x4 = 0, 0
            if not decoding:
                target = symbols[position] - zero
                bit = 1 if target else 0
            while True:
                # ---- the probability that the bit is one
                if mixing and kind < 3:
                    s0, s1 = stretch[prob[x0] >> 4], stretch[prob[x1] >> 4]
                    s2, s3, s4 = stretch[prob[x2] >> 4], stretch[prob[x3] >> 4], stretch[prob[x4] >> 4]
                    dot = weights[sets] * s0 + weights[sets + 1] * s1 + weights[sets + 2] * s2
                    dot = (dot + weights[sets + 3] * s3 + weights[sets + 4] * s4) >> 16
                    p = squash[4095 if dot > 2047 else 1 if dot < -2047 else dot + 2048]
                elif kind < 3:
                    p = prob[x0]
                    p = 32 if p < 32 else 65504 if p > 65504 else p  # noqa: FURB136 - min() is a slow call
                else:
                    p = 32768
                # ---- the range coder
                bound = (span >> 16) * p
                if decoding:
                    bit = 1 if code < bound else 0
                if bit:
                    span = bound
                else:
                    span -= bound
                    if decoding:
                        code -= bound
                    else:
                        low += bound
                while span < 0x100000000:
                    span <<= 8
                    if at >= end:
                        return -1
                    if decoding:
                        code = (code << 8) | data[at]
                    else:
                        if low >= 0x10000000000:  # a carry runs back through the bytes already out
                            back = at - 1
                            while data[back] == 255:
                                data[back] = 0
                                back -= 1
                            data[back] += 1
                        data[at] = (low >> 32) & 255
                        low = (low & 0xFFFFFFFF) << 8
                    at += 1
                # ---- learn from the bit
                if kind < 3:
                    aim = 65535 if bit else 0
                    n = seen[x0]
                    prob[x0] += ((aim - prob[x0]) * rate[n]) >> 16
                    if n < 255:
                        seen[x0] = n + 1
                    if mixing or kind == 0:
                        n = seen[x2]
                        prob[x2] += ((aim - prob[x2]) * rate[n]) >> 16
                        if n < 255:
                            seen[x2] = n + 1
                        n = seen[x3]
                        prob[x3] += ((aim - prob[x3]) * rate[n]) >> 16
                        if n < 255:
                            seen[x3] = n + 1
                    if mixing:
                        n = seen[x1]
                        prob[x1] += ((aim - prob[x1]) * rate[n]) >> 16
                        if n < 255:
                            seen[x1] = n + 1
                        n = seen[x4]
                        prob[x4] += ((aim - prob[x4]) * rate[n]) >> 16
                        if n < 255:
                            seen[x4] = n + 1
                        error = ((bit << 16) - p) * 6
                        weights[sets] += (s0 * error + 131072) >> 18
                        weights[sets + 1] += (s1 * error + 131072) >> 18
                        weights[sets + 2] += (s2 * error + 131072) >> 18
                        weights[sets + 3] += (s3 * error + 131072) >> 18
                        weights[sets + 4] += (s4 * error + 131072) >> 18
                # ---- which bit comes next
                if kind == 0:
                    if bit == 0:
                        break
                    bits, rank = 0, 0
                    if signed:
                        kind, sets = 1, INPUTS
                        up, off_value = above[here_at], here[c]
                        x1 = 9 if up > 0 else 18 if up < 0 else 0
                        x0 = SIGNS + x1 + (3 if left > 0 else 6 if left < 0 else 0)
                        x0 += 1 if off_value > 0 else 2 if off_value < 0 else 0
                        x1, x2, x3, x4 = LAST_SIGN + last_sign, column_sign + c, ROW_SIGN, SIGN
                        bit = 1 if target > 0 else 0
                        continue
                    sign = 1 if last > zero else 0
                elif kind == 1:
                    sign = bit
                else:
                    rank, node, bits = (rank << 1) | bit, (node << 1) | bit, bits + 1
                if bits == depth:
                    value = rank + 1 if sign else -rank - 1
                    break
                if bits == 0:
                    kind, up = 2, above[here_at]
                    node, half = 1, sign << 8
                    want = (target if target > 0 else -target) - 1
                    by_column = BY_COLUMN + half + (bucket[min(mean[c], 2047)] << 9)
                    by_above = BY_ABOVE + half + (grade[up if up > 0 else -up] << 9)
                    by_density, by_last = BY_DENSITY + half + (dense << 9), BY_LAST + half + (last_grade << 9)
                    plain = PLAIN + half
                elif bits == TREE_BITS:
                    kind = 3
                x0, x1, x2, x3, x4 = by_column + node, by_above + node, by_density + node, by_last + node, plain + node
                sets = INPUTS * (2 + bits)
                bit = (want >> (depth - 1 - bits)) & 1
            here[here_at] = value
            if value != 0:
                size = value if value > 0 else -value
                if size > top or zero + value < 0 or zero + value > last:
                    return -2
                last_sign, last_grade = 2 if value > 0 else 1, grade[size]
                n = count[c]
                mean[c] += (((size << 4) - mean[c]) * (rate[n] if n else 65536)) >> 16
                count[c] = n + 1 if n < 255 else n
            if decoding:
                symbols[position] = zero + value
            position += 1
        above, here = here, above
    if decoding:
        return at
    # ---- the value inside the final interval with the most zero bits; its last bytes need not be stored
    for shift in range(40, 30, -1):
        ones = (1 << shift) - 1
        final = (low + ones) & ~ones
        if final < low + span:
            break
    for _ in range(5):
        if at >= end:
            return -1
        if final >= 0x10000000000:
            back = at - 1
            while data[back] == 255:
                data[back] = 0
                back -= 1
            data[back] += 1
        data[at] = (final >> 32) & 255
        final = (final & 0xFFFFFFFF) << 8
        at += 1
    return at
