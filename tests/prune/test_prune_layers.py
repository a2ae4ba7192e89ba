"""Blocks removed by impact and by rule; activations removed and the layers that meet merged; all of it replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier as es
from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.merge import Merge
from espalier.core.model import copy_model
from espalier.core.plan import Plan, applied
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.prune import Activations, Layers, Linear, Magnitude, Prune
from espalier.prune.layers import candidates
from espalier.prune.merging import merge_linear


class Residual(nn.Module):
    """x + scale * MLP(x)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.a, self.act, self.b, self.scale = nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width), scale

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return x + self.scale * self.b(self.act(self.a(x)))


def network(scales: tuple[float, ...] = (1.0, 0.0, 1.0, 1.0, 1.0, 1.0)) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Residual(24, scale) for scale in scales))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), blocks, nn.Linear(24, 10)).eval()


@pytest.fixture(scope="module")
def task() -> Task:
    splits = standard("digits")
    return classification(splits.train, splits.val, splits.test)


def test_candidates_are_the_blocks(task: Task) -> None:
    assert candidates(network(), Context(task=task)) == [f"2.{n}" for n in range(6)]


@pytest.mark.parametrize("by", ["distance", "metric"])
def test_the_useless_block_goes_first(task: Task, by: str) -> None:
    model = es.train.Finetune(epochs=4, lr=5e-3)(network(), Context(task=task))
    smaller = Prune(pattern=Layers(by=by), sparsity=0.17)(model, Context(task=task))  # type: ignore[arg-type]
    assert isinstance(smaller[2][1], nn.Identity)
    images = next(iter(task.data("val")))[0]
    assert torch.allclose(smaller(images), model(images), atol=1e-5)
    assert applied(smaller).to_json() == [{"edit": "remove", "path": "2.1"}]


def test_the_rule_takes_every_second_one_by_one(task: Task) -> None:
    context = Context(task=task)
    method = Prune(pattern=Layers(by="rule", every=2), epochs=3, schedule=Linear())
    smaller = method.transform(network(), context)
    assert [n for n in range(6) if isinstance(smaller[2][n], nn.Identity)] == [1, 3, 5]
    assert context.record.details["removed"] == ["2.1", "2.3", "2.5"]


def test_a_criterion_has_its_say(task: Task) -> None:
    model = network()
    with torch.no_grad():
        for weight in (model[2][4].a.weight, model[2][4].b.weight):
            weight.mul_(0.01)
    smaller = Prune(pattern=Layers(by="criterion"), criterion=Magnitude(), sparsity=0.2)(model, Context(task=task))
    assert isinstance(smaller[2][4], nn.Identity)


def test_no_block_gets_a_sentence(task: Task) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match="nothing to remove"):
        Prune(pattern=Layers(), sparsity=0.5)(model, Context(task=task))


@pytest.mark.parametrize("bias", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("kernels", [(3, 1, 1), (1, 3, 0), (3, 3, 1), (5, 1, 2)])
def test_merged_convolutions_are_exact(kernels: tuple[int, int, int], bias: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    k1, k2, padding = kernels
    model = nn.Sequential(nn.Conv2d(3, 9, k1, padding=padding, bias=bias[0]), nn.Conv2d(9, 4, k2, bias=bias[1]))
    x = torch.randn(2, 3, 12, 12)
    before = model(x)
    Plan((Merge(first="0", second="1"),)).apply(model)
    assert isinstance(model[0], nn.Identity)
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1)),
        (nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 4, 3)),
        (nn.Conv2d(3, 9, 3, groups=3), nn.Conv2d(9, 4, 1)),
        (nn.Conv2d(3, 8, 3), nn.Linear(8, 4)),
    ],
)
def test_what_cannot_be_merged_is_refused(one: nn.Module, two: nn.Module) -> None:
    with pytest.raises(ModelError, match="cannot be merged"):
        Plan((Merge(first="0", second="1"),)).apply(nn.Sequential(one, two))


def test_activations_go_and_layers_merge(task: Task) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = es.train.Finetune(epochs=4, lr=5e-3)(nn.Sequential(nn.Flatten(), *layers), Context(task=task)).eval()
    context = Context(task=task)
    smaller = Prune(pattern=Activations(), sparsity=0.5).transform(copy_model(model), context)
    assert len(context.record.details["removed"]) == 1
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    assert after < before
    fresh = nn.Sequential(nn.Flatten(), *(copy_model(layer) for layer in layers))
    fresh.load_state_dict(model.state_dict())
    again = Plan.from_json(applied(smaller).to_json()).apply(fresh)
    images = next(iter(task.data("val")))[0]
    assert torch.allclose(again(images), smaller(images), atol=1e-5)


def test_fading_ends_linear(task: Task) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10)]
    model = nn.Sequential(nn.Flatten(), *layers)
    method = Prune(pattern=Activations(merge="never"), sparsity=0.5, epochs=4, schedule=Linear(), lr=5e-3)
    smaller = method(model, Context(task=task))
    assert sum(isinstance(m, nn.Identity) for m in smaller) == 1
    assert not [m for m in smaller.modules() if m._forward_hooks]
    assert task.measure(smaller, "val").value > 60


def test_folding_a_norm_on_the_way(task: Task) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 10)).eval()
    model[1].running_mean.normal_()
    images = next(iter(task.data("val")))[0]
    before = model(images)
    assert merge_linear(model, Context(task=task))
    assert isinstance(model[1], nn.Identity)
    assert torch.allclose(model(images), before, atol=1e-4)


def test_files_replay_removed_blocks(task: Task, tmp_path: Path) -> None:
    recipe = es.Recipe(steps=(Prune(pattern=Layers(), sparsity=0.34), Prune(sparsity=0.5)))
    es.compress(network(), task, recipe, out=tmp_path / "run")
    images = next(iter(task.data("val")))[0]
    a, b = es.load(tmp_path / "run/model.espalier"), es.load(tmp_path / "run/model.weights.espalier", into=network())
    assert torch.allclose(a.eval()(images), b.eval()(images), atol=1e-5)
    assert sum(isinstance(m, nn.Identity) for m in b.modules()) == 2
