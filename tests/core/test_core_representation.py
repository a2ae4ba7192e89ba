"""The algebra of stored tensors: take and dense commute, state travels, hostile state is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import Corrupt, UsageError
from espalier.core.representation import (
    DTYPES,
    Affine,
    Codebook,
    Dense,
    Masked,
    Outliers,
    Representation,
    bfloat16_to_float32,
    float32_to_bfloat16,
    from_state,
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
floats = st.sampled_from(["float32", "float16", "float64", "bfloat16"])


def dense(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Dense:
    values = rng.normal(size=shape).astype(np.float32)
    held = float32_to_bfloat16(values) if dtype == "bfloat16" else values.astype(DTYPES[dtype])
    return Dense(shape=shape, dtype=dtype, values=held)


def codebook(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Codebook:
    centroids = np.concatenate([[0], np.sort(rng.normal(size=4))]).astype(np.float32)
    return Codebook(shape=shape, dtype=dtype, indices=rng.integers(0, 5, shape).astype(np.uint8), centroids=centroids)


def channel_codebook(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Codebook:
    if not shape:
        return codebook(shape, dtype, rng)
    axis = int(rng.integers(len(shape)))
    centroids = rng.normal(size=(shape[axis], 5)).astype(np.float32)
    indices = rng.integers(0, 5, shape).astype(np.uint8)
    return Codebook(shape=shape, dtype=dtype, indices=indices, centroids=centroids, axis=axis)


def grouped(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Affine:
    if not shape:
        return affine(shape, dtype, rng)
    group = int(rng.integers(1, 5))
    per = (shape[0], -(-int(np.prod(shape[1:])) // group))
    return Affine(
        shape=shape, dtype=dtype, axis=0, bits_per_code=4, group=group,
        codes=rng.integers(-8, 8, shape).astype(np.int8),
        scale=rng.uniform(0.1, 1, per).astype(np.float32),
        zero_point=rng.integers(-2, 3, per).astype(np.int32),
    )  # fmt: skip


def outliers(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Outliers:
    mask = np.asarray(rng.random(shape) < 0.2)
    large = int(mask.sum())
    inner = (affine, codebook)[int(rng.integers(2))]((mask.size - large,), dtype, rng)
    return Outliers(shape=shape, dtype=dtype, mask=mask, inner=inner, exact=dense((large,), dtype, rng))


def affine(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Affine:
    axis = int(rng.integers(len(shape))) if shape and rng.integers(2) else None
    per = () if axis is None else (shape[axis],)
    return Affine(
        shape=shape, dtype=dtype, axis=axis, bits_per_code=4,
        codes=rng.integers(-8, 8, shape).astype(np.int8),
        scale=rng.uniform(0.1, 1, per).astype(np.float32),
        zero_point=rng.integers(-2, 3, per).astype(np.int32),
    )  # fmt: skip


def masked(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Masked:
    mask = np.asarray(rng.random(shape) < 0.5)
    inner = (dense, codebook)[int(rng.integers(2))]((int(mask.sum()),), dtype, rng)
    return Masked(shape=shape, dtype=dtype, mask=mask, inner=inner)


@st.composite
def representations(draw: st.DrawFn) -> Representation:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return draw(st.sampled_from([dense, codebook, channel_codebook, affine, grouped, masked, outliers]))(
        draw(shapes), draw(floats), rng
    )


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@given(frozen=representations(), data=st.data())
@settings(max_examples=120, deadline=None)
def test_take_and_dense_commute(frozen: Representation, data: st.DataObject) -> None:
    for dim in range(len(frozen.shape)):
        count = frozen.shape[dim]
        index = np.array(
            data.draw(st.lists(st.integers(0, count - 1), max_size=5) if count else st.just([])), dtype=np.int64
        )
        for axis in (dim, dim - len(frozen.shape)):
            taken = frozen.take(axis, index)
            apart = isinstance(frozen, Affine) and frozen.group is not None and dim > 0  # groups come apart
            assert type(taken) is (Dense if apart else type(frozen))
            assert taken.shape == np.take(frozen.dense(), index, axis=axis).shape
            assert same(taken.dense(), np.take(frozen.dense(), index, axis=axis))


@given(frozen=representations())
@settings(max_examples=80, deadline=None)
def test_state_round_trip(frozen: Representation) -> None:
    meta, parts = frozen.state()
    back = from_state(frozen.kind, frozen.shape, frozen.dtype, meta, parts)
    assert same(back.dense(), frozen.dense())
    assert back.dense().shape == frozen.shape
    assert back.bits() == frozen.bits() >= 0
    assert frozen.numel == frozen.dense().size


@given(frozen=representations(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_hostile_state_is_refused_or_decodes(frozen: Representation, data: st.DataObject) -> None:
    meta, parts = frozen.state()
    name = data.draw(st.sampled_from(sorted(parts)))
    attack = data.draw(st.sampled_from(["missing", "shape", "dtype", "kind", "meta", "big", "dims"]))
    shape, kind = frozen.shape, frozen.kind
    if attack == "missing":
        parts = {key: part for key, part in parts.items() if key != name}
    elif attack == "shape":
        shape = (*shape, 2)
    elif attack == "dtype":
        parts = parts | {
            name: parts[name].astype(data.draw(st.sampled_from([np.complex64, np.int8, np.float32, np.bool_])))
        }
    elif attack == "kind":
        kind = data.draw(st.sampled_from(["dense", "masked", "affine", "codebook", "pickle", ""]))
    elif attack == "meta":
        meta = data.draw(
            st.sampled_from(
                [{}, {"bits": "8"}, {"bits": 99}, {"axis": -1, "bits": 8}, {"stored": "object"}, {"inner": 3}]
            )
        )
    elif attack == "big":
        parts = parts | {name: np.full_like(parts[name], 120) if parts[name].dtype != bool else ~parts[name]}
    else:
        parts = parts | {name: parts[name].reshape(-1)[:-1]}
    try:
        back = from_state(kind, shape, frozen.dtype, meta, parts)
    except Corrupt:
        return
    assert back.dense().shape == shape


ONES, CODES, INDICES = np.ones(3, bool), np.zeros(3, np.int8), np.zeros(3, np.uint8)
SCALE, ZERO = np.float32(1), np.int32(0)
THREE_SCALES, THREE_ZEROS, TWO = np.ones(3, np.float32), np.zeros(3, np.int32), np.ones(2, np.float32)
PLAIN = {"inner": {"kind": "dense"}}


@pytest.mark.parametrize(
    ("kind", "dtype", "meta", "parts"),
    [
        ("nothing", "float32", {}, {}),
        ("dense", "float7", {}, {"values": THREE_SCALES}),
        ("dense", "float32", {}, {}),
        ("dense", "float32", {}, {"values": TWO}),
        ("dense", "float32", {}, {"values": THREE_SCALES.astype(np.float64)}),
        ("dense", "float32", {"stored": "pickle"}, {"values": THREE_SCALES}),
        ("masked", "float32", PLAIN, {"mask": INDICES}),
        ("masked", "float32", PLAIN, {"mask": ONES, "inner.values": TWO}),
        ("masked", "float32", {}, {"mask": ONES}),
        ("masked", "float32", {"inner": {}}, {"mask": ONES}),
        ("codebook", "float32", {}, {"indices": np.array([0, 1, 3], np.uint8), "centroids": THREE_SCALES}),
        ("codebook", "float32", {}, {"indices": CODES, "centroids": THREE_SCALES}),
        ("codebook", "float32", {}, {"indices": INDICES, "centroids": THREE_SCALES.reshape(3, 1)}),
        ("codebook", "float32", {}, {"indices": INDICES, "centroids": THREE_SCALES[:0]}),
        ("codebook", "float32", {}, {"indices": INDICES, "centroids": CODES}),
        ("affine", "float32", {"bits": 17}, {"codes": CODES, "scale": SCALE, "zero_point": ZERO}),
        ("affine", "float32", {}, {"codes": CODES, "scale": SCALE, "zero_point": ZERO}),
        (
            "affine",
            "float32",
            {"bits": 8, "axis": 1},
            {"codes": CODES, "scale": THREE_SCALES, "zero_point": THREE_ZEROS},
        ),
        ("affine", "float32", {"bits": 8, "axis": 0}, {"codes": CODES, "scale": TWO, "zero_point": THREE_ZEROS}),
        ("affine", "float32", {"bits": 8}, {"codes": THREE_SCALES, "scale": SCALE, "zero_point": ZERO}),
    ],
)
def test_what_does_not_fit_is_corrupt(kind: str, dtype: str, meta: dict[str, Any], parts: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        from_state(kind, (3,), dtype, meta, {name: np.asarray(part) for name, part in parts.items()})


def test_masks_in_masks_without_end_are_refused() -> None:
    meta: dict[str, Any] = {"kind": "dense"}
    parts = {"inner." * 5000 + "values": np.zeros(3, np.float32)}
    for depth in range(5000):
        meta = {"kind": "masked", "inner": meta}
        parts["inner." * depth + "mask"] = np.ones(3, bool)
    with pytest.raises(Corrupt):
        from_state("masked", (3,), "float32", meta, parts)


@given(values=st.lists(st.floats(width=32, allow_nan=True), max_size=20))
def test_bfloat16_as_torch(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array.copy()).bfloat16()
    bits = float32_to_bfloat16(array)
    back = bfloat16_to_float32(bits)
    assert np.array_equal(back, expected.float().numpy(), equal_nan=True)


def test_bits_count_packed_size() -> None:
    rng = np.random.default_rng(0)
    assert dense((3, 5), "float16", rng).bits() == 15 * 16
    book = codebook((4, 4), "float32", rng)
    assert book.bits() == 16 * 3 + 5 * 32
    assert book.has_zero
    mask = np.eye(4, dtype=bool)
    inner = Dense(shape=(4,), values=np.ones(4, np.float32))
    assert Masked(shape=(4, 4), mask=mask, inner=inner).bits() == 16 + 4 * 32
    one = Affine(
        shape=(6,),
        codes=np.zeros(6, np.int8),
        scale=np.float32(1).reshape(()),
        zero_point=np.int32(0).reshape(()),
        bits_per_code=4,
    )
    assert one.bits() == 6 * 4 + 64
    assert not Codebook(shape=(0,), indices=np.zeros(0, np.uint8), centroids=np.zeros(0, np.float32)).has_zero


def test_affine_is_code_minus_zero_times_scale() -> None:
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    scale, zero = np.array([0.5, 2.0], np.float32), np.array([1, -1], np.int32)
    frozen = Affine(shape=(2, 3), codes=codes, scale=scale, zero_point=zero, axis=0)
    assert frozen.dense().tolist() == [[0, 0.5, 1], [10, 12, 14]]
    assert frozen.take(0, np.array([1])).dense().tolist() == [[10, 12, 14]]
    assert frozen.take(-1, np.array([2, 0])).dense().tolist() == [[1, 0], [14, 10]]


def test_narrowed_keeps_what_would_overflow() -> None:
    small = Dense(shape=(2,), values=np.array([1.0, 1e-3], np.float32))
    assert small.narrowed("float16").stored == "float16"
    assert small.narrowed("float16").dense().dtype == np.float32
    assert small.narrowed("bfloat16").bits() == 32
    large = Dense(shape=(2,), values=np.array([1.0, 1e6], np.float32))
    assert large.narrowed("float16") is large
    assert large.narrowed("bfloat16").dense()[1] == pytest.approx(1e6, rel=2**-8)
    counted = Dense(shape=(1,), dtype="int64", values=np.array([3]))
    assert counted.narrowed("float16") is counted


@pytest.mark.parametrize(
    "build",
    [
        lambda: Dense(shape=(2,), values=np.zeros(3, np.float32)),
        lambda: Dense(shape=(3,), values=np.zeros(3, np.float64)),
        lambda: Masked(shape=(3,), mask=np.ones(2, bool), inner=Dense(shape=(2,), values=np.zeros(2, np.float32))),
        lambda: Masked(shape=(3,), mask=np.ones(3, bool), inner=Dense(shape=(2,), values=np.zeros(2, np.float32))),
        lambda: Codebook(shape=(3,), indices=np.zeros(2, np.uint8), centroids=np.zeros(1, np.float32)),
        lambda: Codebook(shape=(3,), indices=np.zeros(3, np.uint8), centroids=np.zeros((2, 1), np.float32), axis=0),
        lambda: Outliers(
            shape=(3,),
            mask=np.ones(3, bool),
            inner=Dense(shape=(1,), values=np.zeros(1, np.float32)),
            exact=Dense(shape=(2,), values=np.zeros(2, np.float32)),
        ),
        lambda: Affine(
            shape=(3, 4),
            codes=np.zeros((3, 4), np.int8),
            scale=np.ones((3, 1), np.float32),
            zero_point=np.zeros((3, 1), np.int32),
            axis=0,
            group=2,
        ),
        lambda: Affine(
            shape=(3,), codes=np.zeros(3, np.int8), scale=np.ones(3, np.float32), zero_point=np.zeros(3, np.int32)
        ),
    ],
)
def test_a_wrong_construction_says_so(build: Any) -> None:
    with pytest.raises(UsageError, match="shape"):
        build()
