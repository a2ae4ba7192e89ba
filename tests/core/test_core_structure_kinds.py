"""Every structure: the same bits in NumPy and torch in every float type, true gradients, and no forged options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from espalier.core.errors import Corrupt
from espalier.core.forms import dtype_name
from espalier.core.structures import (
    STRUCTURES,
    Circulant,
    Hashed,
    LowRank,
    Monarch,
    Structure,
    TiedKernels,
    TiedRows,
    Toeplitz,
    structure_of,
)
from espalier.core.structures.form import StructuredWeight
from espalier.core.structures.stored import Structured

SAMPLES: tuple[Structure, ...] = (
    LowRank(shape=(7, 3, 2), rank=3),
    Circulant(shape=(7, 10), block=4, flips=0, seed=0),
    Circulant(shape=(10, 7), block=3, flips=1, seed=5),
    Circulant(shape=(6, 4, 3, 3), block=6, flips=1, seed=9),
    Circulant(shape=(5, 5), block=1, flips=0, seed=0),
    Toeplitz(shape=(6, 6), rank=2),
    Toeplitz(shape=(5, 13), rank=3),
    Toeplitz(shape=(13, 5), rank=1),
    Toeplitz(shape=(8, 3, 3, 3), rank=4),
    Monarch(shape=(9, 9), blocks=3, rank=1),
    Monarch(shape=(7, 11), blocks=3, rank=2),
    Monarch(shape=(11, 2, 3), blocks=4, rank=1),
    Monarch(shape=(6, 4), blocks=1, rank=4),
    Hashed(shape=(5, 3, 3), buckets=11, seed=2),
    TiedRows(shape=(5, 2, 3), index=(1, 0, 1, 2, 0)),
    TiedKernels(shape=(4, 3, 2, 2)),
)
BY_KIND = pytest.mark.parametrize("structure", SAMPLES, ids=lambda s: f"{s.kind}-{'x'.join(map(str, s.shape))}")


def test_every_kind_is_here() -> None:
    assert {type(structure) for structure in SAMPLES} == set(STRUCTURES.values())


@BY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=dtype_name)
def test_what_is_stored_is_what_runs(structure: Structure, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    latent = torch.randn(structure.count).to(dtype)
    form = StructuredWeight(structure).eval()
    weight, stored = form(latent), form.freeze(latent)
    assert isinstance(stored, Structured)
    assert weight.dtype == dtype
    assert tuple(weight.shape) == structure.shape
    assert weight.is_contiguous()
    assert np.array_equal(stored.dense().astype(np.float64), weight.double().numpy())


@BY_KIND
def test_the_fast_rule_is_the_exact_one_up_to_rounding(structure: Structure) -> None:
    torch.manual_seed(0)
    parts = structure.split(torch.randn(structure.count))
    assert torch.allclose(structure.fast(parts), structure.dense(parts), atol=1e-5)


@BY_KIND
def test_gradients_are_those_of_the_rule(structure: Structure) -> None:
    torch.manual_seed(0)
    latent = torch.randn(structure.count, dtype=torch.float64, requires_grad=True)
    form = StructuredWeight(structure).train()
    assert torch.autograd.gradcheck(form, (latent,))


@BY_KIND
def test_options_come_back(structure: Structure) -> None:
    assert structure_of(structure.kind, structure.shape, structure.options()) == structure


@BY_KIND
def test_a_wide_step_in_every_number_reaches_the_weight(structure: Structure) -> None:
    """No number is without use where nothing is cut off."""
    torch.manual_seed(0)
    latent = torch.rand(structure.count, dtype=torch.float64) + 0.5
    jacobian = torch.autograd.functional.jacobian(StructuredWeight(structure), latent)
    used = jacobian.reshape(-1, structure.count).abs().sum(0) > 0
    cut = isinstance(structure, Circulant | Toeplitz | Monarch | Hashed)
    assert bool(used.all()) or (cut and float(used.double().mean()) > 0.5)


@pytest.mark.parametrize(
    ("kind", "shape", "options", "message"),
    [
        ("circulant", (4, 6), {"block": 0, "flips": 0, "seed": 0}, "block"),
        ("circulant", (4, 6), {"block": 7, "flips": 0, "seed": 0}, "block"),
        ("circulant", (4, 6), {"block": 2, "flips": 2, "seed": 0}, "flips"),
        ("circulant", (4,), {"block": 2, "flips": 0, "seed": 0}, "two dimensions"),
        ("circulant", (4, 6), {"block": 2, "flips": 0, "seed": -1}, "seed"),
        ("circulant", (4, 6), {"block": 2}, "flips"),
        ("toeplitz", (4, 6), {"rank": 0}, "rank"),
        ("toeplitz", (4, 6), {"rank": 5}, "rank"),
        ("toeplitz", (4, 0), {"rank": 1}, "rank"),
        ("toeplitz", (4,), {"rank": 1}, "two dimensions"),
        ("monarch", (4, 6), {"blocks": 0, "rank": 1}, "blocks"),
        ("monarch", (4, 6), {"blocks": 5, "rank": 1}, "blocks"),
        ("monarch", (4, 6), {"blocks": 2, "rank": 0}, "rank"),
        ("monarch", (4, 6), {"blocks": 2, "rank": 3}, "rank"),
        ("monarch", (4,), {"blocks": 2, "rank": 1}, "two dimensions"),
        ("hashed", (4, 6), {"buckets": 0, "seed": 0}, "buckets"),
        ("hashed", (4, 6), {"buckets": 25, "seed": 0}, "buckets"),
        ("hashed", (4, 6), {"buckets": 3, "seed": 2**41}, "seed"),
        ("tied-rows", (3, 6), {"index": [0, 1]}, "3 rows"),
        ("tied-rows", (3, 6), {"index": [0, 1, 3]}, "left out"),
        ("tied-rows", (3, 6), {"index": [0, 1, 2**39]}, "left out"),
        ("tied-rows", (3, 6), {"index": 3}, "index"),
        ("tied-rows", (3,), {"index": [0, 1, 0]}, "rows"),
        ("tied-kernels", (3, 6), {}, "kernel"),
        ("tied-kernels", (3, 6, 2), {"rank": 1}, "rank"),
    ],
)
def test_forged_options_are_refused(kind: str, shape: tuple[int, ...], options: Any, message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        structure_of(kind, shape, options)
