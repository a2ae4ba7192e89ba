"""Unit criteria that read activations: mean, share of zeros, entropy, rank of the maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.data import standard
from espalier.prune import ActivationMean, AveragePercentageOfZeros, Criterion, Entropy, HRank, Prune, Random, Units
from espalier.prune.activation_mean import mean_absolute
from espalier.prune.apoz import share_active
from espalier.prune.entropy import entropy
from espalier.prune.hrank import ranks
from espalier.train import Finetune

ALL = (ActivationMean(), AveragePercentageOfZeros(), Entropy(), HRank())


def scores(criterion: Criterion, model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    context = Context(task=Task(train=[(x,) for x in batches]))
    return criterion.scores(model, select(model, ("*",)), context)


def two_layers() -> tuple[nn.Sequential, list[Tensor], Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        batches = [torch.randn(n, 5).double() for n in (7, 4)]
    return model, batches, F.relu(model[0](torch.cat(batches))).detach()


def test_mean_and_zeros_by_hand_on_two_layers() -> None:
    model, batches, hidden = two_layers()
    means = scores(ActivationMean(), model, *batches)
    assert torch.allclose(means["0.weight"].double(), hidden.mean(0), atol=1e-6)
    assert torch.allclose(means["2.weight"].double(), model[2](hidden).abs().mean(0), atol=1e-6)
    active = scores(AveragePercentageOfZeros(), model, *batches)
    assert torch.allclose(active["0.weight"], (hidden > 0).float().mean(0))
    assert active["2.weight"].tolist() == [1, 1, 1]
    high = float(hidden.max())
    assert not scores(AveragePercentageOfZeros(tolerance=high), model, *batches)["0.weight"].any()


def test_positions_count_like_samples() -> None:
    a = torch.randn(3, 4, 5, 6).relu()
    assert torch.allclose(mean_absolute(-a), a.mean((2, 3)))
    assert torch.allclose(share_active(a), (a > 0).double().mean((2, 3)))


@pytest.mark.parametrize("bins", [2, 5, 32])
def test_entropy_by_numpy(bins: int) -> None:
    values = np.random.default_rng(0).normal(size=(50, 4)) ** 3
    expected = []
    for unit in values.T:
        counts, _ = np.histogram(unit, bins=bins)
        share = counts[counts > 0] / counts.sum()
        expected.append(-(share * np.log(share)).sum())
    assert np.allclose(entropy(torch.from_numpy(values), bins).numpy(), expected, atol=1e-6)


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_entropy_is_bounded_and_constants_have_none(scale: float, shift: float, seed: int) -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).double()
    values[:, 2] = 1.5
    found = entropy(scale * values + shift, 8)
    assert 0 < float(found[0]) <= np.log(8) + 1e-6
    assert float(found[2]) == 0


def test_entropy_is_of_the_pooled_map() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(1, 3, 3), torch.randn(30, 1, 6, 6)
    (found,) = scores(Entropy(bins=6, batches=2), model, x[:20], x[20:]).values()
    assert torch.allclose(found, entropy(model(x).mean((2, 3)).detach(), 6))


def test_entropy_keeps_what_a_later_step_overwrites() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            out.zero_()
            return out

    model, x = Overwrites(), torch.randn(30, 4)
    (found,) = scores(Entropy(), model, x).values()
    assert torch.allclose(found, entropy(model.layer(x).detach(), 32))


def test_ranks_of_known_maps() -> None:
    row, column = torch.arange(1.0, 5), torch.arange(1.0, 4)
    one = column[:, None] * row
    two = one + torch.outer(column**2, row**2)
    maps = torch.stack([torch.zeros(3, 4), one, two, torch.eye(3, 4)])[None]
    assert ranks(maps).tolist() == [[0, 1, 2, 3]]
    assert ranks(maps.unsqueeze(3).expand(1, 4, 3, 2, 4)).tolist() == [[0, 1, 2, 3]], "rows of all depths together"
    assert ranks(torch.tensor([[0.0, 2.0]])).tolist() == [[0, 1]]
    assert ranks(torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])).tolist() == [[0, 1]]


@given(seed=st.integers(0, 30), rank=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_rank_is_that_of_the_factors(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, 3, *shape, generator=generator) for shape in ((5, rank), (rank, 4)))
    assert (ranks(left @ right) == rank).all()


def test_mean_rank_over_samples_on_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    x = torch.randn(9, 1, 6, 6)
    (found,) = scores(HRank(), model, x[:5], x[5:]).values()
    expected = torch.from_numpy(np.linalg.matrix_rank(model(x).detach().numpy()).mean(0))
    assert torch.allclose(found.double(), expected, atol=1e-6)


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: c.id)
def test_needs_data_but_no_labels(criterion: Criterion) -> None:
    assert criterion.needs == {"train"}
    assert criterion.of == "units"


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Context]:
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10)
        )
    model = Finetune(epochs=3, lr=0.1)(model, context)
    with torch.no_grad():  # half of the channels say nothing: always off, their bias below zero
        model[0].weight[::2] *= 1e-3
        model[0].bias[::2] = -0.1
    return model, context


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: c.id)
def test_silent_channels_of_a_trained_net_go_first(criterion: Criterion, trained: tuple[nn.Module, Context]) -> None:
    model, context = trained
    before = context.measure(model).value
    result = Prune(criterion=criterion, pattern=Units(), layers=("0",), sparsity=0.5)(model, context)
    by_chance = Prune(criterion=Random(), pattern=Units(), layers=("0",), sparsity=0.5)(model, context)
    assert context.measure(result).value == before
    assert context.measure(by_chance).value < before
