"""Toeplitz-like, Monarch and hashed weights: what is found exactly, and how the sizes are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.parametrize import slots
from espalier.core.structures import Monarch as MonarchRule
from espalier.core.structures import Toeplitz as Rule
from espalier.share import Hashed, Monarch, Sharing, Toeplitz
from espalier.share.toeplitz import kernel, mirrored, solve, spectrum, twisted, untwisted


def holding(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.clone()
    return model


def made(method: Sharing, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
    shared = slots(method(holding(weight), Context()))["0.weight"]
    return shared.value(), shared.form.structure.options()  # type: ignore[union-attr]


def test_a_toeplitz_matrix_has_rank_two() -> None:
    torch.manual_seed(0)
    values = torch.randn(23)
    index = torch.arange(12)[:, None] - torch.arange(12) + 11
    found, options = made(Toeplitz(rank=2), values[index])
    assert options == {"rank": 2}
    assert torch.allclose(found, values[index], atol=1e-5)
    assert not torch.allclose(made(Toeplitz(rank=1), values[index])[0], values[index], atol=1e-1)


def test_an_inverse_of_a_toeplitz_matrix_is_toeplitz_like() -> None:
    """The class is closed under inversion up to a small rank, which low rank is not."""
    torch.manual_seed(0)
    index = torch.arange(12)[:, None] - torch.arange(12) + 11
    inverse = torch.linalg.inv(torch.randn(23)[index] + 8 * torch.eye(12))
    assert torch.allclose(made(Toeplitz(rank=4), inverse)[0], inverse, atol=1e-5)


def test_the_spectrum_of_a_toeplitz_like_matrix_is_a_weighted_product() -> None:
    torch.manual_seed(0)
    rule = Rule(shape=(6, 6), rank=2)
    parts = rule.split(torch.randn(rule.count, dtype=torch.float64))
    product = rule.scale * torch.fft.fft(parts["g"]).mT @ twisted(parts["h"])
    weights = kernel(6)[(torch.arange(6)[:, None] + torch.arange(6)) % 6]
    assert torch.allclose(spectrum(rule.squares(parts)), weights * product)
    assert torch.allclose(untwisted(twisted(parts["h"])), parts["h"])


@pytest.mark.parametrize("n", [6, 7])
def test_each_sweep_is_the_least_squares_solution(n: int) -> None:
    torch.manual_seed(0)
    rank = 2
    rule = Rule(shape=(n, n), rank=rank)
    target = torch.randn(1, n, n, dtype=torch.float64)
    parts = rule.split(torch.randn(rule.count, dtype=torch.float64))
    g_hat = solve(spectrum(target)[:, : n // 2 + 1], twisted(parts["h"])) / rule.scale
    h_hat = solve(spectrum(target).mT[:, : (n + 1) // 2], torch.fft.fft(parts["g"])) / rule.scale
    for free, found in (("g", torch.fft.irfft(g_hat, n)), ("h", untwisted(mirrored(h_hat, n)))):
        columns = []
        for k in range(rank * n):
            unit = torch.zeros(rank * n, dtype=torch.float64)
            unit[k] = 1
            columns.append(rule.squares({**parts, free: unit.reshape(1, rank, n)}).reshape(-1))
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), target.reshape(-1, 1)).solution
        assert torch.allclose(found.reshape(-1), wanted.reshape(-1))


def test_sweeps_come_nearer_also_where_a_block_is_cut_off() -> None:
    torch.manual_seed(0)
    for shape in ((8, 8), (8, 19), (19, 8)):
        weight = torch.randn(shape)
        errors = [float((made(Toeplitz(rank=2, sweeps=n), weight)[0] - weight).norm()) for n in (0, 1, 4, 30)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0] - 0.05


def test_numbers_of_toeplitz_are_of_equal_size() -> None:
    slot = slots(Toeplitz(rank=3)(nn.Sequential(nn.Linear(9, 9)), Context()))["0.weight"]
    parts = Rule(shape=(9, 9), rank=3).split(slot.latent.detach())
    assert torch.allclose(parts["g"].norm(dim=-1), parts["h"].norm(dim=-1), rtol=1e-4)


def test_monarch_loses_the_smaller_singular_values_of_its_slices() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 12, dtype=torch.float64).float()
    for blocks, rank in ((3, 1), (2, 2), (4, 1), (1, 5)):
        found, _ = made(Monarch(blocks=blocks, rank=rank), weight)
        slices = weight.double().reshape(12 // blocks, blocks, blocks, 12 // blocks).permute(2, 1, 0, 3)
        lost = torch.linalg.svdvals(slices)[..., rank:].square().sum()
        assert float((found.double() - weight).square().sum()) == pytest.approx(float(lost), rel=1e-5)


def test_a_product_of_block_diagonal_matrices_is_found_exactly() -> None:
    torch.manual_seed(0)
    left, right = torch.block_diag(*torch.randn(4, 4, 4)), torch.block_diag(*torch.randn(4, 4, 4))
    deal = torch.arange(16).reshape(4, 4).T.reshape(-1)
    weight = (left @ right[deal])[deal]
    assert torch.allclose(made(Monarch(blocks=4), weight)[0], weight, atol=1e-5)


def test_sizes_follow_what_is_kept() -> None:
    weight = torch.randn(64, 64)
    assert made(Monarch(keep=0.25), weight)[1] == {"blocks": 8, "rank": 1}
    assert made(Toeplitz(keep=0.25), weight)[1] == {"rank": 8}
    assert made(Hashed(keep=0.25), weight)[1]["buckets"] == 1024
    slot = slots(holding(torch.randn(3, 40)))["0.weight"]
    assert Monarch(blocks=100).structure(slot, Context()) == MonarchRule(shape=(3, 40), blocks=3, rank=1)
    assert Toeplitz(rank=100).structure(slot, Context()) == Rule(shape=(3, 40), rank=3)


def test_a_rank_above_the_smaller_side_is_left_alone() -> None:
    context = Context()
    Monarch(rank=4).transform(holding(torch.randn(3, 40)), context)
    assert "below the rank of 4" in context.record.skipped[0]["reason"]


def test_hashed_layers_and_seeds_have_hashes_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    seeds = {
        slots(Hashed()(model, Context(seed=seed)))[name].form.structure.options()["seed"]  # type: ignore[union-attr]
        for seed in (0, 1)
        for name in ("0.weight", "1.weight")
    }
    assert len(seeds) == 4


@pytest.mark.parametrize(("n", "keep"), [(64, 0.5), (100, 0.5), (63, 0.9)])
def test_the_most_blocks_that_are_allowed_are_found_although_their_numbers_rise_and_fall(n: int, keep: float) -> None:
    slot = slots(nn.Sequential(nn.Linear(n, n)))["0.weight"]
    counts = {blocks: MonarchRule(shape=(n, n), blocks=blocks, rank=1).count for blocks in range(1, n + 1)}
    found = Monarch(keep=keep).structure(slot, Context())
    assert isinstance(found, MonarchRule)
    assert found.blocks == max(blocks for blocks, count in counts.items() if count <= keep * n * n)
