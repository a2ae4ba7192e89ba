"""Small weights whose product is a large one: exact where they can be, never worse than theory where they cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from espalier.compact.decompose import canonical, channel_basis, composed, separable, slices, stacked


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 20), rank=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_slices_miss_the_tail_of_the_singular_values(seed: int, rank: int) -> None:
    weight = normal(5, 3, 9, seed=seed)
    kernels, mixing = slices(weight, rank)
    missed = (torch.einsum("irk,oir->oik", kernels, mixing) - weight).double().square().sum()
    tail = sum(float((np.linalg.svd(weight[:, i].double().numpy())[1][rank:] ** 2).sum()) for i in range(3))
    assert float(missed) == pytest.approx(tail, rel=1e-4, abs=1e-9)


def test_canonical_recovers_a_planted_rank_and_is_exact_at_full_rank() -> None:
    factors = normal(6, 5), normal(4, 5, seed=1), normal(9, 5, seed=2)
    planted = torch.einsum("or,ir,kr->oik", *factors)
    found = canonical(planted, 5, sweeps=300, tolerance=0.0)
    assert float((torch.einsum("or,ir,kr->oik", *found) - planted).norm() / planted.norm()) < 1e-4
    weight = normal(6, 4, 9)
    found = canonical(weight, 4 * 6)
    assert float((torch.einsum("or,ir,kr->oik", *found) - weight).norm()) < 1e-4
    a, b, c = (factor.norm(dim=0) for factor in found)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(b, c)


@given(seed=st.integers(0, 20), rank=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_canonical_is_no_worse_than_its_start(seed: int, rank: int) -> None:
    """The start: the largest terms of the rank-1 slices."""
    weight = normal(5, 4, 9, seed=seed)
    kernels, mixing = slices(weight, -(-rank // 4))
    sizes = (kernels.norm(dim=2) * mixing.norm(dim=0)).flatten()
    start = weight.new_zeros(weight.shape)
    for term in sizes.argsort(descending=True)[:rank].tolist():
        i, r = divmod(term, kernels.shape[1])
        start[:, i] += torch.outer(mixing[:, i, r], kernels[i, r])
    found = torch.einsum("or,ir,kr->oik", *canonical(weight, rank))
    assert float((found - weight).norm()) <= float((start - weight).norm()) * (1 + 1e-4)


def test_a_basis_holds_the_most_energy() -> None:
    weight = normal(6, 4, 3, 3)
    basis = channel_basis(weight, 2, 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    flat = weight.transpose(0, 1).flatten(1)
    values = torch.linalg.svdvals(flat)
    assert float((flat.T @ basis).norm()) == pytest.approx(float(values[:2].norm()), rel=1e-5)


def test_separable_is_exact_for_separable_kernels() -> None:
    columns, rows = normal(3, 4, 3), normal(5, 3, 5, seed=1)
    weight = torch.einsum("miy,omx->oiyx", columns, rows)
    found = torch.einsum("miy,omx->oiyx", *separable(weight, 3))
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)


def test_composed_is_two_convolutions() -> None:
    first, second, x = normal(5, 2, 3, 3), normal(4, 5, 3, 3, seed=1), normal(1, 2, 9, 8, seed=2)
    both = F.conv2d(F.conv2d(x, first), second)
    torch.testing.assert_close(F.conv2d(x, composed(second, first)), both, atol=1e-4, rtol=1e-5)


def test_stacked_finds_a_planted_composition_of_one_channel() -> None:
    """With one middle channel there is one way to take the kernel apart, up to a factor."""
    first, second = normal(1, 3, 3, 3), normal(4, 1, 3, 3, seed=1)
    weight = composed(second, first)
    found = stacked(weight, 1, (3, 3), torch.Generator().manual_seed(0), sweeps=200)
    assert float((composed(found[1], found[0]) - weight).norm() / weight.norm()) < 1e-3


def test_stacked_improves_with_sweeps_and_repeats_for_a_seed() -> None:
    weight = normal(6, 4, 5, 5)

    def missed(sweeps: int) -> float:
        first, second = stacked(weight, 4, (3, 3), torch.Generator().manual_seed(0), sweeps)
        return float((composed(second, first) - weight).norm())

    assert missed(30) < missed(1) < float(weight.norm())
    assert missed(5) == missed(5)
