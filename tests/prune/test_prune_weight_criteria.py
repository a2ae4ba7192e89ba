"""Criteria that read nothing but weights: norms of groups, LAMP, geometric median, mean weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.prune import GeometricMedian, Global, Lamp, Magnitude, MeanWeight, Prune, Units
from espalier.prune import fpgm as fpgm_module
from espalier.prune.fpgm import distances
from espalier.prune.lamp import lamp
from espalier.testing import effective

# --- magnitude ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "gone"), [(1, 1), (2, 0)])
def test_norm_of_a_group(norm: int, gone: int) -> None:
    """Rows (2, 2) and (3, 0): the second is smaller by l1, the first by l2."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 2.0], [3.0, 0.0]]))
    result = Prune(criterion=Magnitude(norm=norm), pattern=Units(), layers=("0",), sparsity=0.5)(model)
    assert not effective(result)["0.weight"][gone].any()
    assert effective(result)["0.weight"][1 - gone].any()
    with pytest.raises(UsageError, match="norm=3"):
        Magnitude(norm=3)  # type: ignore[arg-type]


# --- lamp --------------------------------------------------------------------------------------------------------


def by_hand(weight: np.ndarray) -> np.ndarray:
    flat = weight.reshape(-1).astype(np.float64)
    order = np.argsort(np.abs(flat), kind="stable")
    scores = np.zeros_like(flat)
    for place, index in enumerate(order):
        rest = sum(flat[i] ** 2 for i in order[place:])
        scores[index] = flat[index] ** 2 / rest if rest else 0.0
    return scores.reshape(weight.shape)


@given(values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=24))
@settings(max_examples=50, deadline=None)
def test_lamp_by_hand(values: list[float]) -> None:
    weight = torch.tensor(values)
    found = lamp(weight)
    assert np.allclose(found.numpy(), by_hand(weight.numpy()), rtol=1e-5)
    assert bool((found[weight == 0] == 0).all())
    if weight.square().any():
        assert found[weight.abs().argmax()] > 0
        assert found.max() == pytest.approx(1)


def test_lamp_keeps_the_order_of_a_layer_and_ignores_its_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 9)
    order = weight.abs().reshape(-1).argsort()
    assert bool((lamp(weight).reshape(-1)[order].diff() >= 0).all())
    assert torch.allclose(lamp(weight), lamp(1000 * weight))
    masked = torch.cat([weight, torch.zeros(7, 9)])
    assert torch.equal(lamp(masked)[:7], lamp(weight)), "pruned weights add nothing"


def test_lamp_never_empties_a_layer_where_magnitude_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    with torch.no_grad():
        model[2].weight *= 1e-3
    left = {
        c.id: float(effective(Prune(criterion=c, scope=Global(), sparsity=0.8)(model))["2.weight"].ne(0).sum())
        for c in (Lamp(), Magnitude())
    }
    assert left["magnitude"] <= 1
    assert left["lamp"] > 10


# --- geometric median --------------------------------------------------------------------------------------------


def test_distances_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.randn(13, 5, dtype=torch.float64)
    expected = (rows[:, None] - rows[None]).square().sum(2).sqrt().sum(1)
    assert torch.allclose(distances(rows), expected)
    monkeypatch.setattr(fpgm_module, "_CHUNK", 30)
    assert torch.allclose(distances(rows), expected), "in pieces of two rows"
    near = 1e4 + 1e-2 * torch.arange(3.0)[:, None]
    assert torch.allclose(distances(near), torch.tensor([0.03, 0.02, 0.03]), rtol=0.05), "near filters stay apart"


@given(shift=st.floats(-5, 5), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_median_moves_with_the_filters(shift: float, seed: int) -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose(distances(rows + shift), distances(rows))


def test_the_filter_that_others_replace_goes() -> None:
    model = nn.Conv2d(1, 3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([-5.0, 0.5, 5.0]).reshape(3, 1, 1, 1))
    (score,) = GeometricMedian().scores(model, select(model, ("*",)), Context()).values()
    assert score.argmin() == 1
    assert score.tolist() == pytest.approx([15.5 / (40 / 3), 10.0 / (40 / 3), 14.5 / (40 / 3)])


# --- mean weight -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, one of them grouped, a pool, a flattening; a unit is read by what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(torch.relu(self.norm(self.first(x)))))
        out: Tensor = self.head(torch.relu(self.hidden(self.pool(x).flatten(1))))
        return out


def test_incoming_and_outgoing_by_hand() -> None:
    torch.manual_seed(0)
    model = Net()
    context = Context(task=Task(train=[(torch.randn(2, 1, 6, 6),)]))

    def scores(side: str) -> dict[str, Tensor]:
        return MeanWeight(side=side).scores(model, select(model, ("*",)), context)

    incoming, outgoing, both = scores("in"), scores("out"), scores("both")
    assert torch.allclose(incoming["first.weight"], model.first.weight.abs().mean((1, 2, 3)))
    depth = model.depth.weight.abs()[:, :, 0, 0]
    expected = torch.stack([depth[:2, 0].mean(), depth[:2, 1].mean(), depth[2:, 0].mean(), depth[2:, 1].mean()])
    assert torch.allclose(outgoing["first.weight"], expected)
    blocks = model.hidden.weight.abs().reshape(5, 4, 4)
    assert torch.allclose(outgoing["depth.weight"], blocks.mean((0, 2)))
    assert torch.allclose(outgoing["hidden.weight"], model.head.weight.abs().mean(0))
    assert "head.weight" not in outgoing
    assert [entry["name"] for entry in context.record.skipped] == ["head.weight"]
    assert torch.equal(both["head.weight"], incoming["head.weight"])
    assert torch.allclose(both["hidden.weight"], (incoming["hidden.weight"] + outgoing["hidden.weight"]) / 2)


def test_needs_data_only_to_find_the_readers() -> None:
    assert MeanWeight().needs == frozenset()
    assert MeanWeight(side="both").needs == {"train"}
    assert GeometricMedian().needs == Lamp().needs == frozenset()
