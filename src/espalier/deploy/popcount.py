"""Binary layers on the CPU: signs packed 64 to a word, products by XNOR and popcount, compiled by numba.

Of two rows of n signs that differ in d places the product is n - 2 d, and d is the popcount of an XOR. Everything is
counted in integers, so the result is that of the layer on ``sign(x)`` and ``sign(w)`` exactly, with sign(0) = +1 and
with padding that adds nothing. The channels of a pixel lie in words; an output is a sum over words and kernel places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from espalier.core.errors import NeedError, UsageError
from espalier.encode.compiled import available

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]
WORD = 64


@dataclass(frozen=True)
class PackedWeight:
    """Signs of a weight (outputs, channels, height, width). Linear weights have a kernel of one place.

    ``words``: uint64 (outputs rounded up to 8, places x words of the channels). ``ones``: int64 (places, outputs), how
    many of them are +1. ``scale``, ``bias``: float32 (outputs,), applied to the integers.
    """

    words: Array
    ones: Array
    scale: Array
    bias: Array
    channels: int
    kernel: Pair

    @property
    def outputs(self) -> int:
        """Output channels."""
        return len(self.scale)

    @property
    def nbytes(self) -> int:
        """Of the packed signs."""
        return int(self.words.nbytes)

    @cached_property
    def lanes(self) -> Array:
        """The words of a linear weight as the words of pixels: (1, words, outputs)."""
        return np.ascontiguousarray(self.words[: self.outputs].T)[None]


def pack(weight: Array, scale: Array | None = None, bias: Array | None = None) -> PackedWeight:
    """The signs of ``weight``, (outputs, channels) or (outputs, channels, height, width).

    ``scale`` and ``bias``, (outputs,), go to the outputs; 1 and 0 by default. Raises ``UsageError`` for other shapes.
    """
    if weight.ndim not in (2, 4) or not weight.size:
        raise UsageError(
            f"a binary layer has a weight (outputs, channels) or (outputs, channels, height, width); got "
            f"{weight.shape}."
        )
    weight = weight.reshape(*weight.shape, 1, 1) if weight.ndim == 2 else weight
    outputs, channels, height, width = weight.shape
    for name, values in (("scale", scale), ("bias", bias)):
        if values is not None and values.shape != (outputs,):
            raise UsageError(f"{name} is one number per output, shape ({outputs},); got {values.shape}.")
    bits = (weight >= 0).transpose(0, 2, 3, 1).reshape(outputs, height * width, channels)
    ones = bits.sum(2, dtype=np.int64).T
    padded = np.zeros((-(-outputs // 8) * 8, height * width, -(-channels // WORD) * WORD), dtype=bool)
    padded[:outputs, :, :channels] = bits
    words = np.packbits(padded, axis=2, bitorder="little").view("<u8").astype(np.uint64)
    factor = np.ones(outputs, np.float32) if scale is None else np.ascontiguousarray(scale, np.float32)
    shift = np.zeros(outputs, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
    return PackedWeight(
        words.reshape(len(padded), -1), np.ascontiguousarray(ones), factor, shift, channels, (height, width)
    )  # fmt: skip


def conv2d(x: Array, weight: PackedWeight, stride: Pair = (1, 1), padding: Pair = (0, 0), *, threads: int = 1) -> Array:
    """``conv2d(sign(x), sign(w)) * scale + bias`` in float32; padded places add nothing.

    ``x``: float32 (batch, channels, height, width). Raises ``UsageError`` for shapes that do not fit, ``NeedError``
    without the compiled extra.
    """
    if x.ndim != 4 or x.shape[1] != weight.channels or min(stride) < 1 or min(padding) < 0 or threads < 1:
        raise UsageError(
            f"conv2d takes (batch, {weight.channels}, height, width), strides of 1 and padding of 0 or more, and a "
            f"thread at least; got {x.shape}, stride {stride}, padding {padding}, {threads} threads."
        )
    height, width = ((x.shape[2 + i] + 2 * padding[i] - weight.kernel[i]) // stride[i] + 1 for i in (0, 1))
    if height < 1 or width < 1:
        raise UsageError(f"an input of {x.shape} is smaller than the kernel {weight.kernel}.")
    pack_input, multiply = _kernels(threads)
    x = np.ascontiguousarray(x, np.float32)
    words = np.zeros((x.shape[0], -(-x.shape[1] // WORD), x.shape[2] * x.shape[3]), np.uint64)
    pack_input(x.reshape(x.shape[0], x.shape[1], -1), words)
    found = np.empty((x.shape[0], weight.outputs, height * width), np.float32)
    geometry = (x.shape[2], x.shape[3], height, width, *weight.kernel, *stride, *padding)
    multiply(words, weight.words, weight.ones, weight.scale, weight.bias, weight.channels, geometry, found)
    return found.reshape(x.shape[0], weight.outputs, height, width)


def linear(x: Array, weight: PackedWeight, *, threads: int = 1) -> Array:
    """``linear(sign(x), sign(w)) * scale + bias`` in float32 of ``x`` (batch, channels); raises as :func:`conv2d`."""
    if x.ndim != 2 or x.shape[1] != weight.channels or weight.kernel != (1, 1) or threads < 1:
        raise UsageError(
            f"linear takes (batch, {weight.channels}), a weight without a kernel and a thread at least; got {x.shape}, "
            f"kernel {weight.kernel}, {threads} threads."
        )
    pack_input, multiply = _kernels(threads)
    words = np.zeros((1, weight.words.shape[1], len(x)), np.uint64)
    pack_input(np.ascontiguousarray(x.T, np.float32)[None], words)
    found = np.empty((1, len(x), weight.outputs), np.float32)
    one = np.ones(len(x), np.float32)
    geometry = (1, weight.outputs, 1, weight.outputs, 1, 1, 1, 1, 0, 0)  # the outputs side by side, as pixels are
    rows = np.zeros((-(-len(x) // 8) * 8, words.shape[1]), np.uint64)
    rows[: len(x)] = words[0].T
    multiply(weight.lanes, rows, weight.ones, one, one * 0, weight.channels, geometry, found)
    return np.asarray(found[0] * weight.scale + weight.bias)


def most_threads() -> int:
    """How many threads a call may ask for. Raises ``NeedError`` without the compiled extra."""
    _need()
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined, unused-ignore]


def _kernels(threads: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """``(pack_input, multiply)`` on so many threads, compiled at their first call and then kept on disk."""
    if threads > most_threads():
        raise UsageError(f"the popcount kernel runs on {most_threads()} threads at most here; got {threads}.")
    import numba

    from espalier.deploy.popcount_kernels import multiply, pack_input

    numba.set_num_threads(threads)
    return pack_input, multiply


def _need() -> None:
    if not available():
        raise NeedError("the popcount kernel needs numba, which is not installed: pip install 'espalier[compiled]'.")
