"""Causality: bisection, what an intervention sees, and that the walk keeps what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.graph.channels.surgery import groups_of
from espalier.graph.edit import state_of
from espalier.prune import Causality
from espalier.prune.causality import bisect
from espalier.prune.interventions import Interventions
from espalier.train import Finetune


@pytest.mark.parametrize("seed", range(20))
def test_bisection_accepts_what_can_go_one_by_one(seed: int) -> None:
    """With independent units every harmless one goes, whatever the order, in at most 2 n tests."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 30))
    needed = set(rng.permutation(size)[: rng.integers(0, size + 1)].tolist())
    asked = []

    def allowed(more: NDArray[np.int64]) -> bool:
        asked.append(more)
        return not needed & set(more.tolist())

    gone = bisect(rng.permutation(size), allowed)
    assert set(gone.tolist()) == set(range(size)) - needed
    assert len(asked) <= 2 * size


def test_one_test_if_all_can_go() -> None:
    asked: list[int] = []
    bisect(np.arange(64), lambda more: asked.append(len(more)) is None)
    assert asked == [64]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Task]:
    """A small trained network."""
    splits = standard("digits")
    task = classification(splits.train, splits.val, splits.test)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
    return Finetune(epochs=12, lr=5e-3)(model, Context(task=task)).eval(), task


def test_an_intervention_is_the_network_with_zeroed_units(digits: tuple[nn.Module, Task]) -> None:
    model, task = digits
    images = next(iter(task.data("train")))[0]
    found = groups_of(model, (images,))
    world = Interventions(found, dict(state_of(model)), [[images[:32]], [images[32:]]])
    group = next(g for g in found.groups if g.name == "2")
    mask = np.zeros(group.size, dtype=np.bool_)
    mask[[1, 4, 9]] = True
    by_hand = copy_model(model)
    by_hand[6].weight.data.view(32, 16, 16)[:, [1, 4, 9]] = 0
    world.hold(world.first_reader(group), np.zeros(found.flow.atoms.count, dtype=np.bool_))
    seen = world.outputs(found.removed_atoms({"2": mask}))
    assert torch.allclose(seen, by_hand(images), atol=1e-5)
    assert world.count == 1


@pytest.mark.parametrize("against", ["labels", "predictions"])
def test_agreement_is_kept(digits: tuple[nn.Module, Task], against: str) -> None:
    model, task = digits
    context = Context(task=task)
    method = Causality(against=against, tolerance=0.01, samples=600)  # type: ignore[arg-type]
    smaller = method.transform(copy_model(model), context)
    details = context.record.details
    assert details["agreement"]["after"] >= details["agreement"]["before"] - 0.01
    assert sum(g["after"] for g in details["groups"]) < sum(g["before"] for g in details["groups"])
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert details["interventions"] > 3
    images, _ = next(iter(task.data("train")))
    same = (smaller.eval()(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert same > 0.95


def test_predictions_need_no_labels(digits: tuple[nn.Module, Task]) -> None:
    model, task = digits
    images = next(iter(task.data("train")))[0]
    blind = Task(train=[images], val=[images])
    smaller = Causality(against="predictions", tolerance=0.0)(model, Context(task=blind))
    assert torch.equal(smaller.eval()(images).argmax(1), model(images).argmax(1))
    assert "labels" in Causality().needs


def test_floor(digits: tuple[nn.Module, Task]) -> None:
    model, task = digits
    context = Context(task=task)
    Causality(tolerance=0.9, floor=0.5, samples=200).transform(copy_model(model), context)
    assert all(g["after"] >= g["before"] // 2 for g in context.record.details["groups"])
