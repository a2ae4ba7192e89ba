"""At full rank every split gives what the layer gave: kernels, strides, paddings, dilation, groups, bias, all kinds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.factorize.splitting import put, same, seeded, split_of
from torch import nn

from espalier.factorize import (
    CP,
    SVD,
    ActivationAwareSVD,
    Autoencoder,
    BasisFilters,
    ChannelSVD,
    Factorization,
    LowRankTraining,
    SpatialSVD,
    TensorTrain,
    Tucker,
)
from espalier.factorize.cp import composed, cp
from espalier.factorize.split import Split

CONV = (
    ChannelSVD(), SpatialSVD(), Tucker(), TensorTrain(), BasisFilters(), Autoencoder(), Autoencoder(of="weight"),
    ActivationAwareSVD(), ActivationAwareSVD(by="rms", alpha=1.0), LowRankTraining(),
)  # fmt: skip
MATRIX = (SVD(), TensorTrain(), TensorTrain(cores=2), Autoencoder(), ActivationAwareSVD(), LowRankTraining())


def named(method: Factorization) -> str:
    fields = [str(getattr(method, name)) for name in ("of", "by", "cores") if hasattr(method, name)]
    return "-".join([method.id, *fields])


def convolutions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    bias = itertools.cycle((True, False, False, True, True))
    for kernel, stride, padding, dilation, groups in itertools.product(
        (1, 3, (3, 5)), (1, 2, (2, 1)), (0, 2, (1, 2), "same", "valid"), (1, (1, 2)), (1, 2)
    ):
        if (padding == "same" and stride != 1) or (kernel == 1 and dilation != 1):
            continue
        found.append({"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
                      "groups": groups, "bias": next(bias)})  # fmt: skip
    found += [{"kernel_size": (3, 4), "padding": padding, "padding_mode": mode}
              for mode in ("reflect", "replicate", "circular") for padding in ("same", (1, 2))]  # fmt: skip
    return found


@pytest.mark.parametrize("method", CONV, ids=named)
def test_convolutions(method: Factorization) -> None:
    with seeded():
        for options in convolutions():
            layer = nn.Conv2d(4, 6, **options)
            error = same(method, layer, torch.randn(2, 4, 11, 12))
            assert error < 1e-5, f"{options}: {error}"


@pytest.mark.parametrize("method", MATRIX, ids=named)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(12, 8, True), (8, 12, False), (16, 36, True)])
def test_linear_layers(method: Factorization, inputs: int, outputs: int, bias: bool) -> None:
    with seeded():
        layer = nn.Linear(inputs, outputs, bias=bias)
        assert same(method, layer, torch.randn(300, inputs)) < 1e-5


@pytest.mark.parametrize("method", [m for m in CONV if not isinstance(m, SpatialSVD)], ids=named)
def test_one_axis(method: Factorization) -> None:
    with seeded():
        layer = nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, groups=2)
        assert same(method, layer, torch.randn(2, 4, 30)) < 1e-5


@pytest.mark.parametrize("method", CONV, ids=named)
def test_three_axes(method: Factorization) -> None:
    with seeded():
        layer = nn.Conv3d(4, 6, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1))
        assert same(method, layer, torch.randn(2, 4, 5, 6, 7)) < 1e-5


@pytest.mark.parametrize("method", [SVD(), Autoencoder(of="weight"), LowRankTraining()], ids=named)
def test_tables(method: Factorization) -> None:
    with seeded():
        layer, words = nn.Embedding(11, 6, padding_idx=2), torch.randint(11, (4, 5))
        split, model = split_of(method, layer, words)
        assert isinstance(split, Split)
        before = model(words)
        after, _ = put(split, model, split.limits)
        assert isinstance(after[0][0], nn.Embedding)
        assert after[0][0].padding_idx == 2
        assert torch.allclose(after(words), before, atol=1e-5)


def test_a_convolution_of_kernel_1_is_a_matrix() -> None:
    with seeded():
        layer = nn.Conv2d(6, 8, 1, stride=2, padding=1, groups=2)
        assert same(SVD(), layer, torch.randn(2, 6, 9, 9)) < 1e-5


@pytest.mark.parametrize("method", [CP(sweeps=500), CP(sweeps=500, modes="all")], ids=["3", "all"])
@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, {"kernel_size": (3, 5), "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": "same"},
])  # fmt: skip
def test_cp_recovers_a_planted_rank(method: CP, options: dict[str, Any]) -> None:
    with seeded():
        layer, rank = nn.Conv2d(8, 12, **options), 3
        modes = (12 // layer.groups, 8 // layer.groups, *layer.kernel_size)
        planted = [composed([torch.randn(n, rank) for n in modes]) for _ in range(layer.groups)]
        layer.weight.data = torch.cat(planted)
        assert same(method, layer, torch.randn(2, 8, 11, 12), (rank,)) < 1e-5


def test_cp_spreads_each_term_evenly() -> None:
    with seeded():
        factors = cp(torch.randn(6, 7, 8), 4, torch.Generator(), sweeps=30)
    lengths = torch.stack([factor.norm(dim=0) for factor in factors])
    assert torch.allclose(lengths, lengths[:1].expand(3, -1), rtol=1e-4)


@pytest.mark.parametrize("rank", [2, 6, 27])
def test_cp_finds_tensors_of_low_rank_at_every_higher_one(rank: int) -> None:
    """The Gram matrices are singular there: float32 alone gives NaN, no solution, or more error than the tensor."""
    with seeded():
        one, two = (composed([torch.randn(n, r) for n in (16, 12, 9)]) for r in (1, 2))
        few = torch.cat([one[:1], torch.zeros(15, 12, 9)])
        for tensor in (one, two, few, torch.randn(1, 3, 2), 1e-30 * two, 1e15 * two):
            made = composed(cp(tensor, rank, torch.Generator().manual_seed(0), starts=3))
            assert float((made - tensor).double().norm() / tensor.double().norm()) < 1e-5


def test_terms_of_cp_do_not_grow_against_each_other() -> None:
    with seeded():
        tensor = torch.randn(16, 16, 9)
    errors, terms = [], []
    for penalty in (0.0, CP().penalty):
        factors = cp(tensor, 20, torch.Generator().manual_seed(0), sweeps=200, penalty=penalty)
        errors.append(float((composed(factors) - tensor).norm() / tensor.norm()))
        terms.append(float(torch.stack([factor.norm(dim=0) for factor in factors]).prod(0).square().sum()))
    assert terms[1] < 0.3 * terms[0]
    assert errors[1] < 1.02 * errors[0]


def test_cp_of_dead_filters_and_groups() -> None:
    zeros = cp(torch.zeros(4, 5, 9), 3, torch.Generator())
    assert [tuple(factor.shape) for factor in zeros] == [(4, 3), (5, 3), (9, 3)]
    assert not composed(zeros).any()
    with seeded():
        layer, x = nn.Conv2d(16, 16, 3, groups=2), torch.randn(2, 16, 6, 6)
        layer.weight.data[:8] = 0
        layer.weight.data[9:] = 0
        assert same(CP(), layer, x, (8,)) < 1e-4


def test_both_factors_share_the_singular_values() -> None:
    with seeded():
        split, model = split_of(SVD(), nn.Linear(12, 8), torch.randn(2, 12))
    assert isinstance(split, Split)
    after, _ = put(split, model, (5,))
    first, second = after[0][0].weight, after[0][1].weight
    values = torch.linalg.svdvals(split.layer.tensor[0])[:5]
    assert torch.allclose(first.norm(dim=1) ** 2, values, rtol=1e-4)
    assert torch.allclose(second.norm(dim=0) ** 2, values, rtol=1e-4)
