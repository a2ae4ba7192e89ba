"""What a truncation loses, against the theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factorize.splitting import context, put, run, seeded, split_of
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.factorize import (
    CP,
    SVD,
    ActivationAwareSVD,
    Autoencoder,
    BasisFilters,
    ChannelSVD,
    Fixed,
    SpatialSVD,
    TensorTrain,
    Tucker,
)
from espalier.factorize.evbmf import evbmf_rank
from espalier.factorize.spectra import Decomposed, singular_values
from espalier.factorize.split import Split, relative_error
from espalier.factorize.tensor_train import near_equal


def lost(split: Split, ranks: tuple[int, ...]) -> float:
    """The share of the squared norm that the factors lose."""
    made = split.factors(ranks, Context()).approximation
    assert made is not None
    tensor = split.layer.tensor.double()
    return float((made.double() - tensor).square().sum() / tensor.square().sum())


def a_split(method: object, layer: nn.Module, x: Tensor) -> Split:
    split, _ = split_of(method, layer, x)  # type: ignore[arg-type]
    assert isinstance(split, Split)
    return split


@settings(max_examples=25)
@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_svd_loses_the_tail_exactly(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = torch.randn(2, m, n, generator=torch.Generator().manual_seed(seed))
    found = Decomposed(matrix)
    left, right = found.balanced(rank)
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(found.values, values, atol=1e-5)
    assert torch.allclose(singular_values(matrix).float(), values, atol=1e-5)
    assert left.shape == (2, m, rank)
    assert right.shape == (2, rank, n)
    error = (left @ right - matrix).square().sum((1, 2))
    assert torch.allclose(error, values[:, rank:].square().sum(1), atol=1e-4)


def test_small_singular_values_survive_the_gram_matrix() -> None:
    with seeded():
        u, v = (torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(2))
    values = torch.logspace(0, -5, 20)
    found = Decomposed((u * values) @ v.T)
    assert torch.allclose(found.values[:12], values[:12], rtol=0.05)  # to 1e-3 of the largest; below, all together
    assert float(found.values[12:].square().sum()) == pytest.approx(float(values[12:].square().sum()), rel=0.05)
    left, right = found.balanced(20)
    assert float((left @ right - found.matrix).abs().max()) < 1e-6


def test_a_matrix_of_zeros_stays_zero() -> None:
    left, right = Decomposed(torch.zeros(1, 4, 5)).balanced(2)
    assert not (left @ right).any()


@pytest.mark.parametrize("method", [SVD(), ChannelSVD(), SpatialSVD(), BasisFilters(), Autoencoder(of="weight")],
                         ids=lambda m: m.id)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_one_rank_loses_what_the_spectrum_says(method: object, groups: int) -> None:
    with seeded():
        kernel = 1 if isinstance(method, SVD) else 3
        split = a_split(method, nn.Conv2d(8, 12, kernel, groups=groups), torch.randn(2, 8, 9, 9))
    for rank in range(1, split.limits[0] + 1):
        assert lost(split, (rank,)) == pytest.approx(relative_error(split, (rank,)), abs=1e-6)


@settings(max_examples=20)
@given(r_o=st.integers(1, 12), r_i=st.integers(1, 8), seed=st.integers(0, 9))
def test_tucker_is_within_the_bound(r_o: int, r_i: int, seed: int) -> None:
    with seeded(seed):
        split = a_split(Tucker(), nn.Conv2d(8, 12, 3), torch.randn(2, 8, 9, 9))
    error = lost(split, (r_o, r_i))
    assert error <= relative_error(split, (r_o, r_i)) + 1e-6  # HOSVD is within the sum of both tails
    tails = [float(share[rank:].sum()) for share, rank in zip(split.losses, (r_o, r_i), strict=True)]
    assert error >= max(tails) - 1e-6


def test_sweeps_improve_on_the_first_guess() -> None:
    with seeded():
        x = torch.randn(2, 16, 9, 9)
        layer = nn.Conv2d(16, 16, 3)
        one, many = (lost(a_split(Tucker(sweeps=n, tolerance=1e-9), layer, x), (4, 4)) for n in (1, 20))
    assert many < one


@settings(max_examples=20)
@given(ranks=st.tuples(st.integers(1, 8), st.integers(1, 20), st.integers(1, 12)), seed=st.integers(0, 9))
def test_a_train_of_a_convolution_is_within_the_bound(ranks: tuple[int, ...], seed: int) -> None:
    with seeded(seed):
        split = a_split(TensorTrain(), nn.Conv2d(8, 12, 3), torch.randn(2, 8, 9, 9))
    ranks = tuple(min(rank, limit) for rank, limit in zip(ranks, split.limits, strict=True))
    assert lost(split, ranks) <= relative_error(split, ranks) + 1e-6


@settings(max_examples=20)
@given(cores=st.sampled_from([2, 3]), seed=st.integers(0, 9), data=st.data())
def test_a_train_of_a_matrix_is_within_the_bound_and_is_what_its_layers_do(
    cores: int, seed: int, data: st.DataObject
) -> None:
    with seeded(seed):
        layer, x = nn.Linear(24, 36), torch.randn(7, 24)
        split, model = split_of(TensorTrain(cores=cores), layer, x)  # type: ignore[arg-type]
    assert isinstance(split, Split)
    ranks = tuple(data.draw(st.integers(1, limit)) for limit in split.limits)
    error = lost(split, ranks)
    assert error <= relative_error(split, ranks) + 1e-6
    expected = nn.functional.linear(x, split.factors(ranks, Context()).approximation[0], layer.bias)  # type: ignore[index]
    after, _ = put(split, model, ranks)
    assert torch.allclose(after(x), expected, atol=1e-4)


@given(n=st.integers(1, 500), count=st.integers(1, 4))
def test_factors_multiply_to_the_whole(n: int, count: int) -> None:
    found = near_equal(n, count)
    assert math.prod(found) == n
    assert len(found) == count


def test_factors_are_near_equal() -> None:
    assert near_equal(64, 3) == [4, 4, 4]
    assert near_equal(768, 2) == [24, 32]
    assert near_equal(7, 2) == [1, 7]


def test_activation_aware_beats_plain_svd_on_what_comes_out() -> None:
    with seeded():
        layer = nn.Linear(24, 24, bias=False)
        x = torch.randn(400, 24) * torch.logspace(1, -1, 24)
        errors = []
        for method in (SVD(), ActivationAwareSVD(by="rms", alpha=1.0)):
            split, model = split_of(method, layer, x)
            assert isinstance(split, Split)
            after, _ = put(split, model, (6,))
            errors.append(float((after(x) - layer(x)).detach().square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_activation_aware_is_optimal_for_inputs_without_correlation() -> None:
    """With alpha 1 and the root mean square, ||(W - W_r) diag(s)|| is the tail of the scaled matrix."""
    with seeded():
        layer, x = nn.Linear(10, 8), torch.randn(50, 10) * torch.linspace(0.5, 3, 10)
        split = a_split(ActivationAwareSVD(by="rms", alpha=1.0), layer, x)
    scale = x.square().mean(0).sqrt()
    made = split.factors((3,), Context()).approximation
    assert made is not None
    weight = layer.weight.detach()
    error = float(((weight - made[0]) * scale).square().sum())
    assert error == pytest.approx(float(torch.linalg.svdvals(weight * scale)[3:].square().sum()), rel=1e-4)


def test_inputs_that_are_never_there_keep_their_weights_finite() -> None:
    with seeded():
        x = torch.randn(20, 6)
        x[:, 2] = 0
        split = a_split(ActivationAwareSVD(), nn.Linear(6, 6), x)
    factors = split.factors((2,), Context())
    assert all(bool(weight.isfinite().all()) for weight in factors.weights)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_autoencoder_is_the_pca_of_the_outputs(groups: int) -> None:
    with seeded():
        layer, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(6, 4, 9, 9) + 0.5
        split, model = split_of(Autoencoder(), layer, x)
        assert isinstance(split, Split)
        y = model(x).detach()
        after, _ = put(split, model, (2,))
        z = after(x).detach()
    rows = y.movedim(1, -1).reshape(-1, groups, 8 // groups)
    centred = rows - rows.mean(0)
    spectra = torch.linalg.svdvals(centred.transpose(0, 1))
    assert float((z - y).square().sum()) == pytest.approx(float(spectra[:, 2:].square().sum()), rel=1e-3)
    assert torch.allclose(z.mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-4)


def test_too_few_outputs_code_the_weight() -> None:
    """Eight samples have seven components; any others would be arbitrary."""
    with seeded():
        layer = nn.Linear(64, 64)
        u, _, vh = torch.linalg.svd(layer.weight.detach())
        layer.weight.data = (u * torch.logspace(0, -2, 64)) @ vh
        rows, fresh = torch.randn(8, 64), torch.randn(200, 64)
        around = context(rows)
        model = nn.Sequential(layer).eval()
        answer = model(fresh).detach()
        after = Autoencoder(rank=Fixed(rank=16))(model, around)
        same = Autoencoder(rank=Fixed(rank=16), of="weight")(model, around)
    with torch.no_grad():
        assert float((after(fresh) - answer).norm() / answer.norm()) < 0.5
        assert torch.equal(after(fresh), same(fresh))
    _, record = run(Autoencoder(), model, around.task)
    assert record.notes[0].startswith("0.weight: 8 outputs do not show how 64 units vary together")


@pytest.mark.parametrize(("bent", "kept"), [(True, "relu"), (False, "linear")])
def test_the_relu_stays_where_it_is_better_on_held_out_outputs(bent: bool, kept: str) -> None:
    """Three codes that a ReLU unfolds to six dimensions, or outputs of no shape at all, which planes hold best."""
    with seeded():
        layer, codes = nn.Linear(48, 12, bias=False), torch.randn(3000, 3)
        x = torch.cat([codes, -codes], 1).relu() @ torch.randn(6, 48) if bent else torch.randn(3000, 48)
        split, model = split_of(Autoencoder(hidden="relu", samples=3000, passes=40), layer, x)
        assert isinstance(split, Split)
        y = model(x).detach()
        after, factors = put(split, model, (4,))
    errors = factors.facts["held_out"]
    assert factors.facts["hidden"] == kept, errors
    assert [type(module).__name__ for module in after[0]].count("ReLU") == int(kept == "relu")
    error = float((after(x).detach() - y).square().mean())
    assert error == pytest.approx(float(y.var(0, correction=0).mean()) * errors["relu" if bent else "pca"], rel=0.2)
    assert sum(p.numel() for p in after.parameters()) <= 4 * (48 + 12) + 12


def test_cp_errors_fall_with_the_rank() -> None:
    with seeded():
        split = a_split(CP(), nn.Conv2d(8, 12, 3), torch.randn(2, 8, 9, 9))
    (share,) = split.losses
    assert (share >= 0).all()
    assert float(share.sum()) + split.floor == pytest.approx(1)
    dense = split.layer.dense.parameters
    assert split.cost(split.limits).parameters < dense <= split.cost((split.limits[0] + 1,)).parameters
    assert lost(split, (6,)) <= relative_error(split, (6,)) + 0.05  # more sweeps than the fits that ranks are read off


@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 200), (200, 40)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_evbmf_recovers_the_rank_under_noise(rows: int, columns: int, rank: int) -> None:
    rng = np.random.default_rng(rank)
    signal = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    noisy = signal + 0.3 * rng.normal(size=(rows, columns))
    assert evbmf_rank(np.linalg.svd(noisy, compute_uv=False), rows, columns) == rank


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 576), (20, 30)])
def test_evbmf_finds_nothing_in_noise(rows: int, columns: int) -> None:
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(rows, columns))
        assert evbmf_rank(np.linalg.svd(noise, compute_uv=False), rows, columns) == 0


def test_evbmf_without_noise_is_the_rank() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 40))
    assert evbmf_rank(np.linalg.svd(exact, compute_uv=False), 30, 40) == 3
    assert evbmf_rank(np.zeros(5), 5, 7) == 0
