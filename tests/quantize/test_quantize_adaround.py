"""AdaRound: its relaxation, its schedule, where a ReLU counts, what it learns, and what it keeps."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from tests.quantize.solver_nets import context_for, convolutional, digits_task, distance
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.task import Task
from espalier.quantize import Affine, Quantize
from espalier.quantize.adaround import (
    AdaRound,
    annealed,
    followed_by_relu,
    hard,
    rectified,
    regulariser,
    run,
    soft,
    start_of,
)
from espalier.quantize.grid import Grid
from espalier.quantize.mse import Mse
from espalier.testing.compare import bits, frozen_copy, outputs

FAST = AdaRound(iterations=300, lr=2e-2)


def test_the_start_gives_the_float_weight_back():
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    grid = Grid(torch.full((5, 1), 0.3), torch.zeros(5, 1, dtype=torch.int32), -50, 50)
    v = start_of(w / grid.scale - torch.floor(w / grid.scale))
    assert torch.allclose(soft(w, v, grid), w, atol=1e-5)
    assert torch.allclose(rectified(torch.tensor([-9.0, 0.0, 9.0])), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(hard(w, v, grid), torch.round(w / 0.3) * 0.3, atol=1e-6)


def test_regulariser_is_the_papers():
    h, kept = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([True, True, False, True])
    assert float(regulariser(h, 2.0)) == pytest.approx(0.75 + 1.0)
    assert float(regulariser(h, 2.0, kept)) == pytest.approx(0.75)
    assert float(regulariser(h, 20.0)) == pytest.approx(2 - 0.5**20)


def test_beta_falls_after_the_warm_up():
    assert annealed(199, 1000, 0.2, 20, 2) is None
    assert annealed(200, 1000, 0.2, 20, 2) == 20
    assert annealed(600, 1000, 0.2, 20, 2) == pytest.approx(11)
    assert annealed(1000, 1000, 0.2, 20, 2) == pytest.approx(2)


def test_it_finds_nearly_the_best_of_all_roundings():
    g = torch.Generator().manual_seed(6)
    x = torch.randn(256, 8, generator=g) @ torch.randn(8, 8, generator=g)
    layer = nn.Linear(8, 1, bias=False)
    w = torch.randn(1, 8, generator=g)
    grid = Grid(torch.full((1, 1), 0.5), torch.zeros(1, 1, dtype=torch.int32), -50, 50)
    target = run(layer, x, w)

    def loss(values: Tensor) -> float:
        return float((run(layer, x, values) - target).square().mean())

    every = [(torch.floor(w / 0.5) + torch.tensor([up])) * 0.5 for up in product((0.0, 1.0), repeat=8)]
    method = AdaRound(iterations=1500, lr=1e-2)
    found = method.learn(layer, w, grid, None, x, target, False, torch.Generator().manual_seed(0))
    ordered = sorted(loss(values) for values in every)
    assert loss(found) <= ordered[4]  # of 256
    assert loss(found) < loss(torch.round(w / 0.5) * 0.5)
    assert torch.equal(grid.nearest(found), found)


class _Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.inplace = nn.Linear(4, 3), kind, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "relu":
            return torch.nn.functional.relu(y)
        if self.kind == "in place":
            found: Tensor = self.inplace(y)
            return found
        return y.relu() + y if self.kind == "also read" else y.tanh() if self.kind == "tanh" else y


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("relu", True), ("in place", True), ("also read", False), ("tanh", False), ("nothing", False)],
)
def test_only_a_relu_that_alone_reads_the_output_counts(kind, expected):
    model = _Net(kind)
    context = Context(task=Task(train=[(torch.randn(2, 4), torch.arange(2))]))
    assert followed_by_relu(model, model.layer, context) is expected


def test_what_a_relu_cuts_off_costs_nothing():
    x = torch.rand(64, 3) + 0.5
    layer = nn.Linear(3, 1, bias=False)
    w, grid = torch.full((1, 3), -0.7), Grid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), -3, 3)
    method = AdaRound(iterations=200, lr=1e-2, regularisation=0.0)
    v = start_of(w - torch.floor(w))
    found = method.learn(layer, w, grid, None, x, run(layer, x, w), True, torch.Generator().manual_seed(0))
    assert torch.equal(found, hard(w, v, grid))  # no gradient anywhere: rounded to nearest


@pytest.mark.parametrize("method", [FAST, FAST.replace(symmetric=False), FAST.replace(per="group", group=20)])
def test_it_is_ahead_of_rounding_and_frozen_bit_for_bit(method):
    model, task = convolutional(), digits_task()
    plain = Affine(symmetric=method.symmetric, per=method.per, group=method.group)
    solved, rounded = (
        Quantize(weights=each, bits=3, ends="same", batches=4)(model, Context(task=task)) for each in (method, plain)
    )
    assert distance(solved, model, task) < 0.5 * distance(rounded, model, task)
    assert bits(outputs(solved, task)) == bits(outputs(frozen_copy(solved, through_file=True), task))
    for name, slot in slots(solved).items():
        if name.endswith("weight"):
            assert torch.equal(slot.value(), slot.latent)


def test_same_seed_same_result():
    model, task = convolutional(), digits_task()
    fast = FAST.replace(iterations=20)
    found = [Quantize(weights=fast, bits=3)(model, Context(task=task, seed=5)) for _ in range(2)]
    assert bits(outputs(found[0], task)) == bits(outputs(found[1], task))


def test_masks_and_shared_values_are_kept():
    model, task = copy_model(convolutional()), digits_task()
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) > 0.6
    attach(slots(model)["5.weight"], Mask(mask))
    index = torch.randint(0, 5, (10, 32), generator=torch.Generator().manual_seed(1))
    attach(slots(model)["7.weight"], Shared(index, torch.linspace(-0.3, 0.3, 5), zero=False))
    done = Quantize(weights=FAST.replace(iterations=50), bits=4)(model, context_for(task))
    assert not slots(done)["5.weight"].value()[~mask].any()
    assert len(slots(done)["7.weight"].value().unique()) == 5
    assert bits(outputs(done, task)) == bits(outputs(frozen_copy(done), task))


def test_the_targets_are_those_of_the_original_only_where_its_weights_are_the_same(monkeypatch):
    from espalier.quantize import adaround

    seen = {}
    original = adaround._original

    def note(slot, context):
        found = original(slot, context)
        seen[slot.name] = found is not None
        return found

    monkeypatch.setattr(adaround, "_original", note)
    model, task = convolutional(), digits_task()
    other = copy_model(model)
    with torch.no_grad():
        slots(other)["5.weight"].latent.mul_(2)
    context = context_for(task, original=model)
    Quantize(weights=FAST.replace(iterations=1), bits=4).transform(other, context)
    assert seen == {"0.weight": True, "2.weight": True, "5.weight": False, "7.weight": True}


def test_bad_input():
    with pytest.raises(UsageError, match="iterations"):
        AdaRound(iterations=0)
    task = Task(train=[(torch.full((4, 6), math.nan), torch.arange(4) % 3)])
    with pytest.raises(NumericError, match="NaN"):
        Quantize(weights=FAST, bits=4)(nn.Sequential(nn.Linear(6, 3)), Context(task=task))


def test_the_bias_gets_no_gradient_and_the_range_is_that_of_least_error():
    layer = nn.Linear(3, 1)
    x, w = torch.rand(8, 3), torch.rand(1, 3)
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), -3, 3)
    FAST.replace(iterations=2).learn(layer, w, grid, None, x, run(layer, x, w), False, torch.Generator().manual_seed(0))
    assert layer.bias.grad is None
    assert AdaRound().observer == Mse()


class _InPlace(nn.Module):
    """What follows the layer changes its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.flatten(1))
        y += 5.0
        return self.head(y)


def test_targets_are_what_the_layer_gave_whatever_comes_after_in_place() -> None:
    from espalier.core.context import Context
    from espalier.core.parametrize import slots
    from espalier.core.task import classification
    from espalier.data import standard
    from espalier.quantize.adaround import _data

    torch.manual_seed(0)
    model = _InPlace()
    digits = standard("digits")
    context = Context(task=classification(digits.train, digits.val), models={"original": model})
    found = _data(model, slots(model)["layer.weight"], context, 1)
    assert found is not None
    x, y = found
    assert torch.allclose(y, model.layer(x), atol=1e-5)
