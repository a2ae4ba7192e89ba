"""Ranks: by energy, ratio, EVBMF, budget and by hand. No layer ever grows, whatever is asked."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factorize.splitting import numbers, run, seeded, skipped, split_of
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UnknownNameError, UsageError
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.factorize import (
    CP,
    SVD,
    ActivationAwareSVD,
    Autoencoder,
    BasisFilters,
    Budget,
    ChannelSVD,
    Energy,
    Evbmf,
    Factorization,
    Fixed,
    RankChoice,
    Ratio,
    SpatialSVD,
    TensorTrain,
    Tucker,
)
from espalier.factorize.budget import Point, allot, hull, log_kept
from espalier.factorize.evbmf import evbmf_rank
from espalier.factorize.layer import layers_of
from espalier.factorize.split import Ranks, Split, first_gain, path, relative_error


def low(outputs: int, inputs: int, rank: int, noise: float = 0.0) -> nn.Linear:
    """A layer of this rank, and noise."""
    layer = nn.Linear(inputs, outputs)
    made = torch.randn(outputs, rank) @ torch.randn(rank, inputs) + noise * torch.randn(outputs, inputs)
    layer.weight.data = made / made.std()
    return layer


def net() -> nn.Sequential:
    with seeded():
        return nn.Sequential(low(40, 30, 4, 0.1), nn.ReLU(), low(50, 40, 12, 0.1), nn.ReLU(), nn.Linear(50, 10))


def splits_of(model: nn.Module, method: Factorization) -> tuple[list[Split], Context]:
    context = Context()
    layers = layers_of(model, select(model, ("*",)), context, who="test", densify=False)
    found = [method.split(layer, None, context) for layer in layers]
    return [split for split in found if isinstance(split, Split)], context


def chosen(model: nn.Module, method: Factorization) -> tuple[list[tuple[int, ...] | None], list[Split], Context]:
    splits, context = splits_of(model, method)
    return method.rank.choose(splits, model, context), splits, context


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
def test_energy_is_the_lowest_rank_that_holds_it(energy: float) -> None:
    ranks, splits, _ = chosen(net(), SVD(rank=Energy(energy=energy)))
    for found, split in zip(ranks, splits, strict=True):
        if found is not None:
            values = torch.linalg.svdvals(split.layer.tensor[0]).square()
            shares = values.cumsum(0) / values.sum()
            assert shares[found[0] - 1] >= energy - 1e-5
            assert found[0] == 1 or shares[found[0] - 2] < energy + 1e-5


def test_a_layer_whose_energy_is_spread_is_left_alone_and_said() -> None:
    after, record = run(SVD(rank=Energy(energy=0.97)), net())
    assert isinstance(after[4], nn.Linear)  # type: ignore[index]
    assert (
        "rank 10 holds 0.97 of its energy, which does not make it smaller; rank 8 would be"
        in skipped(record)["4.weight"]
    )


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
def test_ratio_is_the_highest_rank_within_it(keep: float) -> None:
    ranks, splits, _ = chosen(net(), SVD(rank=Ratio(keep=keep)))
    for found, split in zip(ranks, splits, strict=True):
        m, n = split.layer.tensor.shape[1:]
        assert found is not None
        assert found[0] == max(1, int((keep * (m * n + m) - m) / (m + n)))  # the bias is kept


def test_a_ratio_out_of_reach_takes_rank_1_and_says_so() -> None:
    ranks, _, context = chosen(net(), SVD(rank=Ratio(keep=0.01)))
    assert ranks == [(1,)] * 3
    assert "keeps 110 of 1240 parameters, more than the share of 0.01" in context.record.notes[0]


def test_several_ranks_lose_least_within_the_ratio() -> None:
    with seeded():
        layer = nn.Conv2d(12, 16, 3)
        layer.weight.data = torch.einsum("or,rikl->oikl", torch.randn(16, 3), torch.randn(3, 12, 3, 3))
    ((ranks,), (split,), _) = chosen(nn.Sequential(layer), Tucker(rank=Ratio(keep=0.4)))
    assert ranks is not None
    assert ranks[0] <= 4  # three outputs are all there is, so the inputs keep more
    assert split.cost(ranks).parameters <= 0.4 * split.layer.dense.parameters
    assert relative_error(split, ranks) < 0.2


def test_evbmf_reads_off_the_rank() -> None:
    ranks, _, context = chosen(net(), SVD(rank=Evbmf(energy=0.97)))
    assert ranks[:2] == [(4,), (12,)]
    assert ranks[2] is None  # noise alone
    assert "EVBMF gives 0" in context.record.notes[0]
    assert "EVBMF gives 0" in context.record.skipped[0]["reason"]


def test_evbmf_falls_back_to_energy() -> None:
    ranks, splits, context = chosen(net(), SVD(rank=Evbmf(energy=0.4)))
    expected, _, _ = chosen(net(), SVD(rank=Energy(energy=0.4)))
    assert ranks[2] == expected[2] is not None
    assert "its rank is the one that holds 0.4 of the energy" in context.record.notes[0]
    assert len(splits) == 3


def test_evbmf_can_be_weakened() -> None:
    ranks, _, _ = chosen(net(), SVD(rank=Evbmf(weaken=0.9)))
    assert ranks[0] == (30 - int(0.9 * (30 - 4)),)


def test_evbmf_gives_one_rank_to_cp() -> None:
    with seeded():
        layer = nn.Conv2d(24, 24, 3)
        terms = [torch.randn(n, 5) for n in (24, 24, 9)]
        layer.weight.data = torch.einsum("or,ir,kr->oik", *terms).reshape(24, 24, 3, 3)
        layer.weight.data += 0.2 * torch.randn(24, 24, 3, 3)
    ((ranks,), _, _) = chosen(nn.Sequential(layer), CP(rank=Evbmf()))
    assert ranks == (5,)


def test_evbmf_takes_no_zeros_beyond_the_smaller_side_for_noise() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(256, 5)) @ rng.normal(size=(5, 64)) + 0.3 * rng.normal(size=(256, 64))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert evbmf_rank(values, 256, 64) == evbmf_rank(np.append(values, np.zeros(192)), 256, 64) == 5


def test_fixed_by_pattern() -> None:
    ranks, _, context = chosen(net(), SVD(rank=Fixed(rank={"0": 3, "4.weight": 2})))
    assert ranks == [(3,), None, (2,)]
    assert context.record.skipped == [{"name": "2.weight", "reason": "no rank is given for it"}]


def test_fixed_is_lowered_by_name() -> None:
    ranks, splits, context = chosen(net(), SVD(rank=Fixed(rank=500)))
    assert ranks == [first_gain(split) for split in splits]
    assert context.record.notes[0] == "0.weight: rank 500 would not make it smaller; rank 17 it is."


def test_bad_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="rank"):
        Fixed(rank=0)
    with pytest.raises(UsageError, match="rank"):
        Fixed(rank={"*": 0})
    with pytest.raises(UsageError, match="keep"):
        Ratio(keep=1.5)
    with pytest.raises(UnknownNameError, match="'nothing'"):
        chosen(net(), SVD(rank=Fixed(rank={"nothing": 3})))


def test_a_layer_too_small_to_gain_is_listed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(30, 30))
    after, record = run(SVD(), model)
    assert isinstance(after[0], nn.Linear)  # type: ignore[index]
    assert skipped(record)["0.weight"] == "too small to gain: at rank 1 it has 6 numbers, not 6"


@given(points=st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=12))
def test_the_hull_is_convex_and_below(points: list[tuple[int, float]]) -> None:
    costs = sorted({cost for cost, _ in points}, reverse=True)
    losses = sorted(loss for _, loss in points)[: len(costs)]
    row: list[Point] = [(cost, loss, None) for cost, loss in zip(costs, losses, strict=True)]
    kept = hull(row)
    assert kept[0] == 0
    assert kept[-1] == len(row) - 1
    slopes = [(row[b][1] - row[a][1]) / (row[a][0] - row[b][0]) for a, b in itertools.pairwise(kept)]
    assert all(one <= two + 1e-9 for one, two in itertools.pairwise(slopes))
    for a, b in itertools.pairwise(kept):
        for place in range(a, b):
            on = row[a][1] + (row[a][0] - row[place][0]) * (row[b][1] - row[a][1]) / (row[a][0] - row[b][0])
            assert row[place][1] >= on - 1e-9


@settings(max_examples=40)
@given(seed=st.integers(0, 999), share=st.floats(0.05, 1))
def test_the_allotment_is_within_the_budget_and_near_the_best(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers: list[list[Point]] = []
    for _ in range(3):
        costs = torch.randint(1, 20, (4,), generator=generator).cumsum(0).flip(0).tolist()
        losses = torch.rand(4, generator=generator).cumsum(0).tolist()
        layers.append([(c, loss - losses[0], None) for c, loss in zip(costs, losses, strict=True)])
    budget = share * sum(row[0][0] for row in layers)
    places = allot(layers, budget)
    cost = sum(row[place][0] for row, place in zip(layers, places, strict=True))
    loss = sum(row[place][1] for row, place in zip(layers, places, strict=True))
    lowest = sum(row[-1][0] for row in layers)
    assert cost <= budget or cost == lowest
    if cost > budget:
        return
    best = min(
        sum(point[1] for point in points) for points in itertools.product(*layers)
        if sum(point[0] for point in points) <= budget
    )  # fmt: skip
    step = max(b[1] - a[1] for row in layers for a, b in itertools.pairwise([row[p] for p in hull(row)]))
    assert best - 1e-9 <= loss <= best + step + 1e-9  # at most the last step more than the best of all


@pytest.mark.parametrize("method", [SVD(), ChannelSVD(), Tucker(), SpatialSVD()], ids=lambda m: m.id)
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_budget_is_met_and_used_up(method: Factorization, keep: float) -> None:
    with seeded():
        model: nn.Module = net()
        if not isinstance(method, SVD):
            model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 20, 3), nn.Conv2d(20, 16, (3, 5)))
    ranks, splits, _ = chosen(model, method.replace(rank=Budget(keep=keep)))
    costs = [
        s.layer.dense.parameters if r is None else s.cost(r).parameters for s, r in zip(splits, ranks, strict=True)
    ]
    allowed = keep * sum(split.layer.dense.parameters for split in splits)
    assert sum(costs) <= allowed
    one_rank = max(
        split.cost(tuple(r + (mode == at) for at, r in enumerate(found))).parameters - split.cost(found).parameters
        for split, found in zip(splits, ranks, strict=True) if found is not None for mode in range(len(found))
    )  # fmt: skip
    gap = max(split.layer.dense.parameters - split.cost(first_gain(split) or ()).parameters for split in splits)
    assert allowed - sum(costs) < max(one_rank, gap)


def test_a_budget_spends_where_it_loses_least() -> None:
    with seeded():
        model = nn.Sequential(low(40, 40, 2), nn.Linear(40, 40))
    ranks, _, context = chosen(model, SVD(rank=Budget(keep=0.7)))
    assert ranks == [(2,), None]
    assert context.record.skipped == [{"name": "1.weight", "reason": "the budget is met without it"}]


def test_no_layer_is_given_up_for_the_others() -> None:
    """Rows that have much in common: rank 1 keeps nearly all of the norm, and tells none from the others."""
    with seeded():
        model = nn.Sequential(nn.Embedding(100, 32), *(nn.Linear(32, 32) for _ in range(4)))
        model[0].weight.data += 5
    costs = []
    for least in (0.0, 0.5):
        (table, *_), (split, *_), _ = chosen(model, SVD(rank=Budget(keep=0.7, least=least)))
        assert table is not None
        costs.append(split.cost(table).parameters / split.layer.dense.parameters)
    assert costs[0] < 0.3
    assert 0.35 <= costs[1] <= 0.7


def test_a_budget_keeps_the_largest_product() -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 16), nn.Linear(16, 12))
        for at, layer in enumerate(model):  # spectra that fall at different speeds
            layer.weight.data *= torch.linspace(1, 0.1, layer.in_features) ** (2 * at)  # type: ignore[operator,arg-type]
    ranks, splits, _ = chosen(model, SVD(rank=Budget(keep=0.6, least=0)))
    allowed = 0.6 * sum(split.layer.dense.parameters for split in splits)

    def worth(each: tuple[Ranks | None, ...]) -> float:
        cost = sum(s.layer.dense.parameters if r is None else s.cost(r).parameters
                   for s, r in zip(splits, each, strict=True))  # fmt: skip
        kept = sum(0.0 if r is None else log_kept(s, r) for s, r in zip(splits, each, strict=True))
        return kept if cost <= allowed else -math.inf

    options = [[None, *((r,) for r in range(1, split.limits[0]) if split.gains((r,)))] for split in splits]
    best = max(map(worth, itertools.product(*options)))
    assert worth(tuple(ranks)) > best - 0.1


def test_a_budget_of_multiplications() -> None:
    with seeded():
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(16, 16, 3, padding=1))
        x = torch.randn(2, 8, 16, 16)
    method = Tucker(rank=Budget(keep=0.5, of="macs"))
    task = Task(train=[(x,)], val=[(x,)])
    _, record = run(method, model, task)
    rows = {row["name"]: row for row in record.details["factors"]}
    before = 8 * 16 * 9 * 256 + 16 * 16 * 9 * 16
    first = rows["0.weight"]["macs"]
    assert first[0] == 8 * 16 * 9 * 256  # at sixteen by sixteen places
    spent = sum(rows[name]["macs"][1] if name in rows else dense for name, dense in (
        ("0.weight", 8 * 16 * 9 * 256), ("2.weight", 16 * 16 * 9 * 16)))  # fmt: skip
    assert spent <= 0.5 * before


class Two(nn.Module):
    """Equal weights, of which one sees inputs a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.b.weight.data = self.a.weight.data.clone()

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(100 * x)


@pytest.mark.parametrize("method", [ActivationAwareSVD(), Autoencoder()], ids=lambda m: m.id)
def test_absolute_errors_are_those_of_what_is_split(method: Factorization) -> None:
    with seeded():
        model, x = Two(), torch.randn(256, 64)
    ranks = {}
    for error in ("relative", "absolute"):
        asked = method.replace(rank=Budget(keep=0.5, error=error, least=0))  # type: ignore[arg-type]
        _, record = run(asked, model, Task(train=[(x,)], val=[(x,)]))
        ranks[error] = {row["name"]: row["ranks"][0] for row in record.details["factors"]}
    assert abs(ranks["relative"]["a.weight"] - ranks["relative"]["b.weight"]) < 4
    assert ranks["absolute"]["a.weight"] == 1
    assert ranks["absolute"].get("b.weight", 64) > 20


def test_tables_have_no_multiplications_to_save() -> None:
    with seeded():
        model = nn.Sequential(nn.Embedding(100, 40), nn.Linear(40, 40))
    _, _, context = chosen(model, SVD(rank=Budget(keep=0.5, of="macs")))
    assert {"name": "0.weight", "reason": "no rank lowers its multiplications"} in context.record.skipped


def test_a_budget_out_of_reach_is_said() -> None:
    ranks, _, context = chosen(net(), SVD(rank=Budget(keep=0.01)))
    assert ranks == [(1,)] * 3
    assert "more than the" in context.record.notes[0]


def test_absolute_errors_spare_the_layer_that_weighs_more() -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        model[0].weight.data *= 10
    relative, _, _ = chosen(model, SVD(rank=Budget(keep=0.6)))
    absolute, _, _ = chosen(model, SVD(rank=Budget(keep=0.6, error="absolute")))
    assert absolute[0] is None or (relative[0] is not None and absolute[0] > relative[0])


def any_rank() -> st.SearchStrategy[RankChoice]:
    share = st.floats(0.02, 1)
    return st.one_of(
        st.builds(Energy, energy=share), st.builds(Ratio, keep=share), st.builds(Evbmf, weaken=share, energy=share),
        st.builds(Budget, keep=share, of=st.sampled_from(["parameters", "macs"])),
        st.builds(Fixed, rank=st.integers(1, 600)),
    )  # fmt: skip


@settings(max_examples=60)
@given(
    rank=any_rank(),
    method=st.sampled_from([SVD(), ChannelSVD(), SpatialSVD(), Tucker(), TensorTrain(cores=2), BasisFilters()]),
    layer=st.builds(
        dict, inputs=st.sampled_from([1, 2, 6, 12]), outputs=st.sampled_from([2, 8, 14]),
        kernel_size=st.sampled_from([1, 3, (3, 5)]), stride=st.sampled_from([1, 2]), groups=st.sampled_from([1, 2]),
    ),
    seed=st.integers(0, 20),
)  # fmt: skip
def test_nothing_ever_grows(rank: RankChoice, method: Factorization, layer: dict[str, Any], seed: int) -> None:
    with seeded(seed):
        inputs, outputs = layer["inputs"], layer["outputs"]
        groups = layer["groups"] if inputs % layer["groups"] == 0 else 1
        conv = nn.Conv2d(inputs, outputs, layer["kernel_size"], stride=layer["stride"], groups=groups)
        model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(7))
        x = torch.randn(2, inputs, 9, 9)
        model(x)
    task = Task(train=[(x,)], val=[(x,)])
    after, record = run(method.replace(rank=rank), model, task)
    assert numbers(after) <= numbers(model)
    for row in record.details["factors"]:
        assert row["parameters"][1] < row["parameters"][0]
        if row["name"] == "0.weight":
            assert row["macs"][1] <= row["macs"][0]
    assert len(record.details["factors"]) + len(skipped(record)) >= 2
    assert after(x).shape == model(x).shape


def test_more_multiplications_only_if_asked() -> None:
    """Two steps apart the kernel of 1 before the core runs at four times the places."""
    with seeded():
        layer, x = nn.Conv2d(16, 16, 3, stride=3), torch.randn(2, 16, 30, 30)
        split, _ = split_of(Tucker(), layer, x)
        allowed, _ = split_of(Tucker(grow_macs=True), layer, x)
    assert isinstance(split, Split)
    assert isinstance(allowed, Split)
    assert not split.gains((10, 10))
    assert allowed.gains((10, 10))


def test_the_path_ends_at_rank_1_and_each_step_loses_more() -> None:
    with seeded():
        split, _ = split_of(Tucker(), nn.Conv2d(6, 8, 3), torch.randn(2, 6, 9, 9))
    assert isinstance(split, Split)
    steps = path(split)
    assert steps[0].ranks == split.limits
    assert steps[-1].ranks == (1, 1)
    assert len(steps) == sum(split.limits) - 1
    assert all(a.error <= b.error + 1e-12 for a, b in itertools.pairwise(steps))
    assert steps[-1].error == pytest.approx(relative_error(split, (1, 1)))
