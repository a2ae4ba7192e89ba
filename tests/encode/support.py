"""Files with something of everything in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.core.representation import Affine, Codebook, Dense, Masked, Outliers, Representation, float32_to_bfloat16


def sparse_indices(shape: tuple[int, ...], density: float, levels: int, seed: int) -> np.ndarray[Any, Any]:
    """Codebook indices with zeros (code 0) in a pattern of strong and weak columns."""
    rng = np.random.default_rng(seed)
    columns = rng.beta(0.5, 0.5 / density - 0.5, size=shape[-1])
    found = (rng.random(shape) < columns) * rng.integers(1, levels, shape)
    return found.astype(np.uint8)


def codebook(shape: tuple[int, ...], density: float = 0.1, levels: int = 16, seed: int = 0) -> Codebook:
    """Pruned and shared: centroid 0 is zero, the others ascend."""
    rng = np.random.default_rng(seed + 1)
    centroids = np.r_[0.0, np.sort(rng.normal(size=levels - 1))].astype(np.float32)
    return Codebook(shape=shape, indices=sparse_indices(shape, density, levels, seed), centroids=centroids)


def dense(values: Any, dtype: str = "float32") -> Dense:
    """Values as they are."""
    array = np.asarray(values)
    return Dense(shape=array.shape, dtype=dtype, values=array)


def every_kind(seed: int = 0) -> dict[str, Representation]:
    """Small tensors of every kind, nested ones and edge cases included."""
    return first_kinds(seed) | quantized_kinds(seed)


def quantized_kinds(seed: int = 0) -> dict[str, Representation]:
    """What quantization added: groups, a table for each channel, outliers."""
    rng = np.random.default_rng(seed + 2)
    mask = rng.random((6, 5)) < 0.3
    kept = int(mask.sum())
    codes = rng.integers(-8, 8, (4, 6)).astype(np.int8)
    return {
        "grouped.weight": Affine(
            shape=(4, 6),
            codes=codes,
            scale=rng.random((4, 2)).astype(np.float32) + np.float32(0.5),
            zero_point=np.zeros((4, 2), np.int32),
            axis=0,
            group=4,
        ),
        "tables.weight": Codebook(
            shape=(4, 6),
            indices=(codes + 8).astype(np.uint8),
            centroids=rng.normal(size=(4, 16)).astype(np.float32),
            axis=0,
        ),
        "outliers.weight": Outliers(
            shape=(6, 5),
            mask=mask,
            inner=Affine(
                shape=(30 - kept,),
                codes=rng.integers(-4, 4, 30 - kept).astype(np.int8),
                scale=np.array(0.1, np.float32),
                zero_point=np.array(0, np.int32),
                bits_per_code=3,
            ),
            exact=dense(rng.normal(size=kept).astype(np.float32)),
        ),
    }


def first_kinds(seed: int = 0) -> dict[str, Representation]:
    """Those of the first golden files."""
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 5)) < 0.3
    kept = int(mask.sum())
    shared = Codebook(
        shape=(kept,),
        indices=rng.integers(0, 4, kept).astype(np.uint8),
        centroids=np.sort(rng.normal(size=4)).astype(np.float32),
    )
    codes = rng.integers(-8, 8, (4, 6)).astype(np.int8)
    return {
        "fc1.weight": codebook((12, 9), seed=seed),
        "fc1.bias": dense(rng.normal(size=12).astype(np.float32)),
        "masked.weight": Masked(shape=(6, 5), mask=mask, inner=dense(rng.normal(size=kept).astype(np.float32))),
        "nested.weight": Masked(shape=(6, 5), mask=mask, inner=shared),
        "affine.weight": Affine(
            shape=(4, 6),
            codes=codes,
            scale=np.array(0.1, np.float32),
            zero_point=np.array(1, np.int32),
            bits_per_code=4,
        ),
        "channel.weight": Affine(
            shape=(4, 6),
            codes=codes,
            scale=rng.random(4).astype(np.float32) + np.float32(0.5),
            zero_point=rng.integers(-3, 3, 4).astype(np.int32),
            axis=0,
        ),
        "half": dense(rng.normal(size=(3, 2)).astype(np.float16), "float16"),
        "brain": dense(float32_to_bfloat16(rng.normal(size=7).astype(np.float32)), "bfloat16"),
        "double": dense(rng.normal(size=3), "float64"),
        "steps": dense(np.array(12345, dtype=np.int64), "int64"),
        "flags": dense(rng.random(9) < 0.5, "bool"),
        "empty": dense(np.zeros((0, 3), dtype=np.float32)),
        "scalar": dense(np.array(-0.0, dtype=np.float32)),
    }


def same(a: Representation, b: Representation) -> bool:
    """Whether two representations are equal bit for bit, kinds and meta included."""
    if (a.kind, a.shape, a.dtype) != (b.kind, b.shape, b.dtype) or a.state()[0] != b.state()[0]:
        return False
    left, right = a.state()[1], b.state()[1]
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and left[k].tobytes() == right[k].tobytes()
        for k in left
    )
