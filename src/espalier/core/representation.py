"""How one frozen tensor is stored: representations, their algebra, and nothing else.

A representation is the *frozen* form of a tensor (the training form is a parametrization, see
``core/parametrize.py``). It holds NumPy arrays only, so the file decoder works without torch. Every
kind reduces to a small JSON-able ``meta`` and a small dict of named arrays (``parts``): integer parts
go to the entropy coders, float parts to the float coders; the container knows nothing else.

    Dense     values as they are; stored dtype may be narrower than the dtype handed back
    Masked    a boolean mask and the representation of the kept values
    Affine    integer codes, scale, zero point      w = (code - zero) * scale
    Outliers  a mask, coarse values, exact values   value-aware quantization
    Codebook  indices and centroids                 w = centroids[index]

bfloat16, which NumPy lacks, is held as its uint16 bits and handed back as exact float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt, UsageError

Array = NDArray[Any]
Meta = dict[str, Any]

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
"""Tensor dtype name -> NumPy dtype that holds its bits."""


def bfloat16_to_float32(bits: Array) -> Array:
    """bfloat16 bit patterns (uint16, any shape) as exact float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """float32 values as bfloat16 bit patterns (uint16), rounded to nearest even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass(frozen=True, kw_only=True, eq=False)
class Representation(ABC):
    """One frozen tensor of ``shape`` that :meth:`dense` hands back in ``dtype`` (a name of ``DTYPES``)."""

    kind: ClassVar[str]
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        """Number of elements of the dense tensor."""
        return math.prod(self.shape)

    @abstractmethod
    def dense(self) -> Array:
        """The tensor's values, shape ``self.shape``; bfloat16 comes as float32."""

    @abstractmethod
    def take(self, dim: int, index: Array) -> Representation:
        """Keep ``index`` (1-D int array) along dimension ``dim``, as ``numpy.take``, without re-coding."""

    @abstractmethod
    def bits(self) -> int:
        """Packed size in bits before entropy coding. For planning; never reported as a size."""

    @abstractmethod
    def state(self) -> tuple[Meta, dict[str, Array]]:
        """``(meta, parts)``: what :func:`from_state` needs beside kind, shape and dtype."""

    @classmethod
    @abstractmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Representation:
        """Inverse of :meth:`state`. Raises ``Corrupt`` when the parts do not fit together."""


def _refuse(message: str) -> None:
    raise Corrupt(f"representation does not fit together: {message}")


def _cast(values: Array, dtype: str) -> Array:
    """``values`` as dtype ``dtype`` (bfloat16: rounded to bfloat16 precision, held in float32)."""
    if dtype == "bfloat16":
        return bfloat16_to_float32(float32_to_bfloat16(values.astype(np.float32)))
    return values.astype(DTYPES[dtype], copy=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense(Representation):
    """Values as they are. ``values``: array of ``shape`` held as dtype ``stored`` (default: ``dtype``)."""

    kind: ClassVar[str] = "dense"
    values: Array
    stored: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored", self.stored or self.dtype)
        if self.values.shape != self.shape or self.values.dtype != DTYPES[self.stored]:
            raise UsageError(
                f"Dense of shape {self.shape} stored as {self.stored} got values of shape {self.values.shape}, "
                f"dtype {self.values.dtype}"
            )

    def dense(self) -> Array:
        if self.stored == "bfloat16":
            return _cast(bfloat16_to_float32(self.values), self.dtype)
        return _cast(self.values, self.dtype)

    def take(self, dim: int, index: Array) -> Dense:
        values = np.take(self.values, index, axis=dim)
        return Dense(shape=values.shape, dtype=self.dtype, values=values, stored=self.stored)

    def narrowed(self, stored: str) -> Dense:
        """The same tensor stored as ``float16`` or ``bfloat16``; itself where a value would overflow."""
        if self.stored not in ("float32", "float64"):
            return self
        if stored == "bfloat16":
            values = float32_to_bfloat16(self.values.astype(np.float32))
            back = bfloat16_to_float32(values)
        else:
            with np.errstate(over="ignore"):
                values = self.values.astype(np.float16)
            back = values
        if not np.array_equal(np.isfinite(back), np.isfinite(self.values)):
            return self
        return Dense(shape=self.shape, dtype=self.dtype, values=values, stored=stored)

    def bits(self) -> int:
        return self.values.nbytes * 8

    def state(self) -> tuple[Meta, dict[str, Array]]:
        return ({"stored": self.stored} if self.stored != self.dtype else {}), {"values": self.values}

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Dense:
        stored = meta.get("stored", dtype)
        values = parts["values"]
        if stored not in DTYPES or values.shape != shape or values.dtype != DTYPES[stored]:
            _refuse(f"dense values {values.shape} {values.dtype} for shape {shape} {stored}")
        return cls(shape=shape, dtype=dtype, values=values, stored=stored)


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked(Representation):
    """Zeros and the rest. ``mask``: bool of ``shape``; ``inner``: 1-D, the kept values in C order."""

    kind: ClassVar[str] = "masked"
    mask: Array
    inner: Representation

    def __post_init__(self) -> None:
        if self.mask.shape != self.shape or self.mask.dtype != np.bool_:
            raise UsageError(f"Masked of shape {self.shape} got a mask of shape {self.mask.shape}, {self.mask.dtype}")
        if self.inner.shape != (int(self.mask.sum()),):
            raise UsageError(f"Masked keeps {int(self.mask.sum())} values but inner has shape {self.inner.shape}")

    def dense(self) -> Array:
        values = self.inner.dense()
        out = np.zeros(self.shape, dtype=values.dtype)
        out[self.mask] = values
        return _cast(out, self.dtype)

    def take(self, dim: int, index: Array) -> Masked:
        position = np.full(self.shape, -1, dtype=np.int64)
        position[self.mask] = np.arange(self.inner.numel)
        position = np.take(position, index, axis=dim)
        mask = position >= 0
        return Masked(shape=mask.shape, dtype=self.dtype, mask=mask, inner=self.inner.take(0, position[mask]))

    def bits(self) -> int:
        return self.numel + self.inner.bits()

    def state(self) -> tuple[Meta, dict[str, Array]]:
        meta, parts = self.inner.state()
        return {"inner": {"kind": self.inner.kind, **meta}}, {
            "mask": self.mask,
            **{f"inner.{name}": part for name, part in parts.items()},
        }

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Masked:
        mask = parts["mask"]
        if mask.shape != shape or mask.dtype != np.bool_:
            _refuse(f"mask {mask.shape} {mask.dtype} for shape {shape}")
        inner_meta = dict(meta["inner"])
        kind = inner_meta.pop("kind")
        if kind == cls.kind:
            _refuse("a mask inside a mask")
        inner_parts = {name.removeprefix("inner."): part for name, part in parts.items() if name != "mask"}
        inner = from_state(kind, (int(mask.sum()),), dtype, inner_meta, inner_parts)
        return cls(shape=shape, dtype=dtype, mask=mask, inner=inner)


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Representation):
    """``(codes - zero_point) * scale``, computed in float32 in this order.

    ``codes``: integers of ``shape``; ``scale``: float32 and ``zero_point``: int32, both of shape ``()`` (per tensor),
    ``(shape[axis],)`` (per channel along ``axis``), or with ``group`` ``(shape[0], groups)``: each for that many
    entries of a row, the last group of a row may be shorter. ``bits_per_code``: 1..16.
    """

    kind: ClassVar[str] = "affine"
    codes: Array
    scale: Array
    zero_point: Array
    bits_per_code: int = 8
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        expected = _affine_scales(self.shape, self.axis, self.group)
        if self.codes.shape != self.shape or self.scale.shape != expected or self.zero_point.shape != expected:
            raise UsageError(
                f"Affine of shape {self.shape}, axis {self.axis}, group {self.group} got codes {self.codes.shape}, "
                f"scale {self.scale.shape}, zero point {self.zero_point.shape}"
            )

    def dense(self) -> Array:
        scale, zero = self.scale, self.zero_point
        if self.group is not None:
            scale, zero = (self._spread(values) for values in (scale, zero))
        elif self.axis is not None:
            view = [1] * len(self.shape)
            view[self.axis] = -1
            scale, zero = scale.reshape(view), zero.reshape(view)
        shifted = (self.codes.astype(np.int32) - zero.astype(np.int32)).astype(np.float32)
        return _cast(shifted * scale.astype(np.float32), self.dtype)

    @property
    def zero(self) -> int | None:
        """The code of zero where it is the same everywhere."""
        zeros = self.zero_point
        return int(zeros.flat[0]) if zeros.size and bool((zeros == zeros.flat[0]).all()) else None

    def _spread(self, values: Array) -> Array:
        """(rows, groups) -> ``shape``."""
        assert self.group is not None  # noqa: S101 - asked by the caller
        return np.repeat(values, self.group, axis=1)[:, : math.prod(self.shape[1:])].reshape(self.shape)

    def take(self, dim: int, index: Array) -> Representation:
        codes = np.take(self.codes, index, axis=dim)
        rows = dim % len(self.shape) == 0
        if self.group is not None and not rows:  # groups come apart: the values stay, the grid is gone
            return Dense(shape=self.shape, dtype=self.dtype, values=_bits(self.dense(), self.dtype)).take(dim, index)
        same = self.axis is None or dim % len(self.shape) != self.axis
        return Affine(
            shape=codes.shape,
            dtype=self.dtype,
            codes=codes,
            scale=self.scale if same else self.scale[index],
            zero_point=self.zero_point if same else self.zero_point[index],
            bits_per_code=self.bits_per_code,
            axis=self.axis,
            group=self.group,
        )

    def bits(self) -> int:
        return self.numel * self.bits_per_code + 8 * (self.scale.nbytes + self.zero_point.nbytes)

    def state(self) -> tuple[Meta, dict[str, Array]]:
        meta: Meta = {"bits": self.bits_per_code}
        if self.axis is not None:
            meta["axis"] = self.axis
        if self.group is not None:
            meta["group"] = self.group
        return meta, {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Affine:
        axis, bits, group = meta.get("axis"), meta["bits"], meta.get("group")
        codes, scale, zero = parts["codes"], parts["scale"], parts["zero_point"]
        if axis is not None and not (isinstance(axis, int) and 0 <= axis < len(shape)):
            _refuse(f"axis {axis!r} of a tensor of shape {shape}")
        if group is not None and not (type(group) is int and group >= 1 and axis == 0):
            _refuse(f"groups of {group!r} along axis {axis!r}; 1 or more along axis 0 allowed")
        if not (isinstance(bits, int) and 1 <= bits <= 16):
            _refuse(f"{bits!r} bits; 1 to 16 allowed")
        expected = _affine_scales(shape, axis, group)
        if codes.shape != shape or scale.shape != expected or zero.shape != expected:
            _refuse(f"affine codes {codes.shape}, scale {scale.shape}, zero point {zero.shape} for shape {shape}")
        if codes.dtype.kind not in "iu" or zero.dtype.kind not in "iu" or scale.dtype.kind != "f":
            _refuse("affine codes and zero points are integers, scales are floats")
        return cls(
            shape=shape, dtype=dtype, codes=codes, scale=scale, zero_point=zero, bits_per_code=bits, axis=axis,
            group=group,
        )  # fmt: skip


def _affine_scales(shape: tuple[int, ...], axis: int | None, group: int | None) -> tuple[int, ...]:
    """The shape of scale and zero point."""
    if axis is None:
        return ()
    return (shape[axis],) if group is None else (shape[0], -(-math.prod(shape[1:]) // group))


def _bits(values: Array, dtype: str) -> Array:
    """``values`` as the bits that dtype ``dtype`` is held in."""
    return float32_to_bfloat16(values) if dtype == "bfloat16" else values


@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers(Representation):
    """Most values on a coarse grid, a few exactly. ``mask``: bool of ``shape``, True where ``exact`` speaks.

    ``inner``: the values where ``mask`` is False, ``exact``: the others; both 1-D, in C order.
    """

    kind: ClassVar[str] = "outliers"
    mask: Array
    inner: Representation
    exact: Representation

    def __post_init__(self) -> None:
        large = int(self.mask.sum())
        if self.mask.shape != self.shape or self.mask.dtype != np.bool_:
            raise UsageError(f"Outliers of shape {self.shape} got a mask of shape {self.mask.shape}, {self.mask.dtype}")
        if self.inner.shape != (self.numel - large,) or self.exact.shape != (large,):
            raise UsageError(
                f"Outliers with {large} of {self.numel} exact got inner of shape {self.inner.shape}, exact of "
                f"{self.exact.shape}"
            )

    def dense(self) -> Array:
        inner, exact = self.inner.dense(), self.exact.dense()
        out = np.zeros(self.shape, dtype=inner.dtype)
        out[~self.mask], out[self.mask] = inner, exact
        return _cast(out, self.dtype)

    def take(self, dim: int, index: Array) -> Outliers:
        position = np.zeros(self.shape, dtype=np.int64)
        for chosen in (self.mask, ~self.mask):
            position[chosen] = np.arange(int(chosen.sum()))
        position, mask = np.take(position, index, axis=dim), np.take(self.mask, index, axis=dim)
        return Outliers(
            shape=mask.shape, dtype=self.dtype, mask=mask, inner=self.inner.take(0, position[~mask]),
            exact=self.exact.take(0, position[mask]),
        )  # fmt: skip

    def bits(self) -> int:
        return self.numel + self.inner.bits() + self.exact.bits()

    def state(self) -> tuple[Meta, dict[str, Array]]:
        meta: Meta = {}
        parts = {"mask": self.mask}
        for place, part in (("inner", self.inner), ("exact", self.exact)):
            own, arrays = part.state()
            meta[place] = {"kind": part.kind, **own}
            parts |= {f"{place}.{name}": array for name, array in arrays.items()}
        return meta, parts

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Outliers:
        mask = parts["mask"]
        if mask.shape != shape or mask.dtype != np.bool_:
            _refuse(f"mask {mask.shape} {mask.dtype} for shape {shape}")
        large, made = int(mask.sum()), {}
        for place, count in (("inner", mask.size - large), ("exact", large)):
            own = dict(meta[place])
            kind = own.pop("kind")
            if kind not in ("dense", "affine", "codebook"):
                _refuse(f"a {kind!r} inside outliers")
            arrays = {name.removeprefix(f"{place}."): a for name, a in parts.items() if name.startswith(f"{place}.")}
            made[place] = from_state(kind, (count,), dtype, own, arrays)
        return cls(shape=shape, dtype=dtype, mask=mask, inner=made["inner"], exact=made["exact"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook(Representation):
    """``centroids[indices]``: a table gather, no arithmetic, so bit-exact everywhere.

    ``indices``: unsigned integers of ``shape``; ``centroids``: floats ``(k,)``, k >= 1 unless the tensor
    is empty; with ``axis`` ``(shape[axis], k)``, a table for each channel. A
    pruned and shared tensor has 0.0 as centroid 0: *zero is a symbol of its own*.
    """

    kind: ClassVar[str] = "codebook"
    indices: Array
    centroids: Array
    axis: int | None = None

    def __post_init__(self) -> None:
        fits = self.centroids.ndim == 1 if self.axis is None else self.centroids.shape[:1] == (self.shape[self.axis],)
        if self.indices.shape != self.shape or not fits or self.centroids.ndim != 1 + (self.axis is not None):
            raise UsageError(
                f"Codebook of shape {self.shape}, axis {self.axis} got indices {self.indices.shape}, centroids "
                f"{self.centroids.shape}"
            )

    def dense(self) -> Array:
        if self.axis is None:
            return _cast(self.centroids[self.indices], self.dtype)
        channel = np.arange(self.shape[self.axis]).reshape(
            [-1 if d == self.axis else 1 for d in range(len(self.shape))]
        )
        return _cast(self.centroids[channel, self.indices], self.dtype)

    def take(self, dim: int, index: Array) -> Codebook:
        indices = np.take(self.indices, index, axis=dim)
        cut = self.axis is not None and dim % len(self.shape) == self.axis
        return Codebook(
            shape=indices.shape, dtype=self.dtype, indices=indices,
            centroids=self.centroids[index] if cut else self.centroids, axis=self.axis,
        )  # fmt: skip

    @property
    def has_zero(self) -> bool:
        """Whether centroid 0 is exactly zero (the pruned symbol)."""
        return bool(self.axis is None and self.centroids.size and self.centroids[0] == 0)

    def bits(self) -> int:
        symbols = self.centroids.shape[-1]
        return self.numel * max(1, math.ceil(math.log2(max(2, symbols)))) + 8 * self.centroids.nbytes

    def state(self) -> tuple[Meta, dict[str, Array]]:
        return {} if self.axis is None else {"axis": self.axis}, {"indices": self.indices, "centroids": self.centroids}

    @classmethod
    def build(cls, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Codebook:
        indices, centroids, axis = parts["indices"], parts["centroids"], meta.get("axis")
        if axis is not None and not (type(axis) is int and 0 <= axis < len(shape)):
            _refuse(f"axis {axis!r} of a tensor of shape {shape}")
        fits = centroids.ndim == 1 if axis is None else centroids.ndim == 2 and len(centroids) == shape[axis]
        if indices.shape != shape or indices.dtype.kind != "u" or not fits or centroids.dtype.kind != "f":
            _refuse(f"codebook indices {indices.shape} {indices.dtype}, centroids {centroids.shape} {centroids.dtype}")
        if indices.size and int(indices.max()) >= centroids.shape[-1]:
            _refuse(f"index {int(indices.max())} of a codebook of {centroids.shape[-1]}")
        return cls(shape=shape, dtype=dtype, indices=indices, centroids=centroids, axis=axis)


KINDS: dict[str, type[Representation]] = {cls.kind: cls for cls in (Dense, Masked, Affine, Outliers, Codebook)}


def from_state(kind: str, shape: tuple[int, ...], dtype: str, meta: Meta, parts: Mapping[str, Array]) -> Representation:
    """Rebuild a representation from untrusted ``meta`` and ``parts``; raises ``Corrupt`` if they do not fit."""
    if kind not in KINDS or dtype not in DTYPES:
        _refuse(f"unknown kind {kind!r} or dtype {dtype!r}")
    try:
        return KINDS[kind].build(shape, dtype, meta, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"representation {kind!r} of shape {shape} is incomplete: {error!r}") from error
