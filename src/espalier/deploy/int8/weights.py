"""Weights as int8 codes: those that training fixed, bit for bit; others rounded, symmetric per output channel.

A trained weight reaches the file in another layout (transposed) and with a factor per output channel (a folded batch
norm). Both leave its codes alone: w' = f (c - z) s = (c - z) (f s). So codes are found again by comparing numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from espalier.core.errors import NumericError
from espalier.core.representation import Affine, Masked, Representation
from espalier.deploy.runtimes import Array

CLOSE = 1e-5
"""Relative difference up to which a folded weight counts as its codes times one factor per channel: float32 folding
leaves about 1e-7."""


@dataclass(frozen=True)
class Codes:
    """``codes`` int8 in the layout of the file, ``scale`` float32 of one number per index of ``axis``.

    ``kept``: the codes are those of training. ``bits``: of the codes; ``note``: what was not kept, and why.
    """

    codes: Array
    scale: Array
    axis: int
    bits: int
    kept: bool = False
    note: str = ""


@dataclass(frozen=True)
class Fixed:
    """Codes of training, zero point taken off: the weight ``name`` is ``codes * scale`` along ``axis``, if any."""

    name: str
    codes: Array
    scale: Array
    axis: int | None
    bits: int


def fixed_codes(tensors: Mapping[str, Representation], aliases: Mapping[str, str]) -> list[Fixed]:
    """What of a frozen model is integer codes of at most 8 bits: ``Affine``, and ``Masked`` around one scale."""
    names = {**{name: name for name in tensors}, **aliases}
    found = [_fixed(name, tensors[source]) for name, source in names.items()]
    return [each for each in found if each is not None]


def _fixed(name: str, kept: Representation) -> Fixed | None:
    inner = kept.inner if isinstance(kept, Masked) else kept
    if not isinstance(inner, Affine) or inner.bits_per_code > 8:
        return None
    if isinstance(kept, Masked):
        if inner.axis is not None:
            return None
        codes = np.zeros(kept.shape, np.int32)
        codes[kept.mask] = inner.codes.astype(np.int32) - inner.zero_point.astype(np.int32)
        return Fixed(name, codes, inner.scale, None, inner.bits_per_code)
    view = [-1 if axis == inner.axis else 1 for axis in range(len(inner.shape))]
    zero = inner.zero_point.astype(np.int32).reshape(view if inner.axis is not None else ())
    return Fixed(name, inner.codes.astype(np.int32) - zero, inner.scale, inner.axis, inner.bits_per_code)


def encode(
    weight: Array, axis: int, bits: int, fixed: list[Fixed], name: str, *, at_least: Array | None = None
) -> Codes:
    """The codes of ``weight`` (float32, output channels along ``axis``) with ``bits`` of the 8.

    ``at_least``: the smallest scale of each channel with which its bias fits into int32. Raises ``NumericError`` for
    numbers that are not finite, and for trained codes whose scale is below ``at_least``.
    """
    if not np.isfinite(weight).all():
        raise NumericError(f"the weight {name!r} holds NaN or infinity; int8 needs finite numbers.")
    note = ""
    for each, codes, scale in _same(weight, axis, fixed):
        note = _unfit(each, codes, bits)
        if note:
            break
        if at_least is not None and (scale < at_least).any():
            raise NumericError(
                f"the bias of {name!r} does not fit into int32 at the trained scale of {each.name!r} "
                f"({float(scale.min()):.3g}). Leave the layer out: keep_fp32=[{name!r}], or train with a wider range."
            )
        return Codes(codes.astype(np.int8), scale, axis, each.bits, kept=True)
    return _rounded(weight, axis, bits, at_least, note)


def _rounded(weight: Array, axis: int, bits: int, at_least: Array | None, note: str) -> Codes:
    most = 2 ** (bits - 1) - 1
    others = tuple(place for place in range(weight.ndim) if place != axis)
    largest = np.abs(weight).max(axis=others) if weight.size else np.zeros(weight.shape[axis], np.float32)
    scale = np.where(largest > 0, largest / most, 1.0)
    scale = np.maximum(scale, np.float64(1e-30) if at_least is None else at_least).astype(np.float32)
    codes = np.clip(np.rint(weight / scale.reshape(_along(axis, weight.ndim))), -most, most)
    return Codes(codes.astype(np.int8), scale, axis, bits, note=note)


def _unfit(each: Fixed, codes: Array, bits: int) -> str:
    """Why trained codes cannot stand in the file; empty where they can."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = (int(codes.min(initial=0)), int(codes.max(initial=0)))
    if found[0] >= low and found[1] <= high:
        return ""
    return (
        f"the trained codes of {each.name} reach from {found[0]} to {found[1]} around zero; {bits} bits without a zero "
        f"point hold {low} to {high}, so the weight was rounded anew"
    )


def _same(weight: Array, axis: int, fixed: list[Fixed]) -> Iterator[tuple[Fixed, Array, Array]]:
    """Trained weights that are ``weight`` up to layout and a factor per channel: (which, codes, scale per channel)."""
    for each in fixed:
        if each.codes.size != weight.size:
            continue
        for codes, own in _layouts(each, weight.shape):
            if own is not None and own != axis:
                continue
            scale = np.broadcast_to(each.scale.astype(np.float32).reshape(-1), (weight.shape[axis],))
            view = _along(axis, weight.ndim)
            trained = codes.astype(np.float32) * scale.reshape(view)
            if np.array_equal(trained, weight):
                yield each, codes, scale.copy()
                continue
            others = tuple(place for place in range(weight.ndim) if place != axis)
            energy = (trained.astype(np.float64) ** 2).sum(axis=others)
            factor = (weight.astype(np.float64) * trained).sum(axis=others) / np.where(energy > 0, energy, 1.0)
            if not np.allclose(trained * factor.reshape(view), weight, rtol=CLOSE, atol=0):
                continue
            sign = np.sign(factor).astype(np.int32)
            signed = codes * sign.reshape(view)
            yield each, signed, np.where(factor == 0, 1.0, scale * np.abs(factor)).astype(np.float32)


def _layouts(each: Fixed, shape: tuple[int, ...]) -> Iterator[tuple[Array, int | None]]:
    """The codes as they are and transposed, where the shape agrees, with the axis of their scales."""
    if each.codes.shape == shape:
        yield each.codes, each.axis
    if each.codes.ndim == 2 and each.codes.T.shape == shape:
        yield each.codes.T, None if each.axis is None else 1 - each.axis


def _along(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(-1 if place == axis else 1 for place in range(ndim))
