"""Activations that go: each place alone, none that runs in place or not at all; layers that meet, smaller or faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.parametrize import slots
from espalier.core.plan import Plan, applied
from espalier.core.recipe import Recipe
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.measure.speed import Latency
from espalier.prune import Activations, Linear, Prune, merging
from espalier.prune.activations import out_of_place, split_places
from espalier.prune.merging import clearly_faster, merge_linear


@pytest.fixture(scope="module")
def task() -> Task:
    splits = standard("digits")
    return classification(splits.train, splits.val, splits.test)


class Shared(nn.Module):
    """One activation at two places, one that runs twice, one that never runs."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 10)
        self.first = act()
        self.second = self.first
        self.twice, self.unused = nn.Tanh(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.b(self.first(self.a(x.flatten(1)))))
        out: Tensor = self.d(self.twice(self.c(self.twice(x))))
        return out


def shared(act: type[nn.Module] = nn.ReLU) -> Shared:
    torch.manual_seed(0)
    return Shared(act).eval()


def test_places_are_split_and_parameters_are_not() -> None:
    model = shared(nn.PReLU)
    assert split_places(model) == ["first", "second", "twice", "unused"]
    assert model.first is not model.second
    assert model.first.weight is model.second.weight
    assert set(slots(model)) == set(slots(shared(nn.PReLU)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_one_place_goes_and_the_other_stays(task: Task, act: type[nn.Module]) -> None:
    """Which two of three go is what a search by hand says; the plan does the same to a fresh model."""
    model, context = shared(act), Context(task=task)
    result: Any = Prune(pattern=Activations(merge="never"), sparsity=0.34).transform(copy_model(model), context)
    details = context.record.details
    assert details["activations"] == 3
    (gone,) = details["removed"]
    images = [batch[0] for batch, _ in zip(task.data("val"), range(4), strict=False)]
    impact = {}
    for path in ("first", "second", "twice"):
        other: Any = copy_model(model)
        split_places(other)
        setattr(other, path, nn.Identity())
        with torch.no_grad():
            impact[path] = sum(float((other(x) - model(x)).norm() / model(x).norm()) ** 2 for x in images)
    assert gone == min(impact, key=lambda path: impact[path])
    fresh = Plan.from_json(applied(result).to_json()).apply(shared(act))
    assert torch.equal(fresh(images[0]), result(images[0]))
    expected: Any = shared(act)
    setattr(expected, gone, nn.Identity())
    assert torch.equal(expected(images[0]), result(images[0]))


def test_what_runs_twice_is_noted_and_what_never_runs_is_listed(task: Task) -> None:
    context = Context(task=task)
    Prune(pattern=Activations(), sparsity=0.9).transform(shared(), context)
    assert any("twice (2 times)" in note for note in context.record.notes)
    assert {"name": "unused", "reason": "the model does not call it"} in context.record.skipped
    assert sorted(context.record.details["removed"]) == ["first", "second", "twice"]


@pytest.mark.parametrize("epochs", [0, 3])
def test_in_place_functions_have_an_impact_too(task: Task, epochs: int) -> None:
    """A hook that hands back the input hands back the overwritten one: all would seem harmless."""

    def network(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 24), nn.ReLU(inplace), nn.Linear(24, 24), nn.ReLU(inplace), nn.Linear(24, 10)]
        with torch.no_grad():
            layers[2].bias += 5.0  # the second one does nothing
        return nn.Sequential(nn.Flatten(), *layers)

    method = Prune(pattern=Activations(merge="never"), sparsity=0.5, epochs=epochs, schedule=Linear(), lr=1e-3)
    results = []
    for inplace in (False, True):
        context = Context(task=task)
        result = method.transform(network(inplace), context)
        assert context.record.details["removed"] == ["4"]
        assert result[2].inplace is inplace  # type: ignore[index, union-attr]
        results.append(result)
    for name, value in results[0].state_dict().items():
        assert torch.equal(value, results[1].state_dict()[name])


def test_out_of_place_puts_back() -> None:
    acts: list[nn.Module] = [nn.ReLU(inplace=True), nn.Tanh()]
    with out_of_place(acts):
        assert acts[0].inplace is False
    assert acts[0].inplace is True


# --- merging -----------------------------------------------------------------------------------------------------


def took(*milliseconds: float) -> Latency:
    return Latency.of([ms / 1e3 for ms in milliseconds], batch=1, threads=1)


@pytest.mark.parametrize(
    ("one", "other", "faster"),
    [
        (took(1, 1.1, 1.2), took(2, 2.1, 2.2), True),
        (took(2, 2.1, 2.2), took(1, 1.1, 1.2), False),
        (took(1, 1.1, 9), took(2, 2.1, 2.2), False),  # now and then slower than the other ever is
        (took(2, 2.05, 2.1), took(1, 2.2, 2.3), False),  # the other is as fast often enough
        (took(1, 1, 1), took(1, 1, 1), False),
    ],
)
def test_faster_means_beyond_the_spread(one: Latency, other: Latency, faster: bool) -> None:
    assert clearly_faster(one, other) is faster


def pair(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(hidden)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), norm, nn.Linear(hidden, 10)).eval()


def clock(monkeypatch: pytest.MonkeyPatch, apart: float, whole: float) -> list[tuple[Any, ...]]:
    """A clock that knows in advance; keeps what was run: the layers of both, and how far their outputs are apart."""
    runs: list[tuple[Any, ...]] = []

    def latency(models: Any, call: Any, **_: Any) -> dict[str, Latency]:
        outputs = [call(model) for model in models.values()]
        layers = [[type(layer).__name__ for layer in model] for model in models.values()]
        runs.append((*layers, float((outputs[0] - outputs[1]).detach().abs().max())))
        return {"apart": took(apart, apart, apart), "whole": took(whole, whole, whole)}

    monkeypatch.setattr(merging, "latency", latency)
    return runs


@pytest.mark.parametrize(("hidden", "smaller"), [(48, True), (4, False)])
@pytest.mark.parametrize(("apart", "whole"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_rule_decides_and_the_record_says_why(
    task: Task, monkeypatch: pytest.MonkeyPatch, hidden: int, smaller: bool, apart: float, whole: float
) -> None:
    runs = clock(monkeypatch, apart, whole)
    images = next(iter(task.data("val")))[0]
    for rule, merges in (("smaller", smaller), ("faster", whole < apart)):
        model, context = pair(hidden), Context(task=task)
        before = model(images)
        assert bool(merge_linear(model, context, rule)) is merges  # type: ignore[arg-type]
        assert isinstance(model[1], nn.Identity) is merges
        assert torch.allclose(model(images), before, atol=1e-4)
        (decision,) = context.record.details["pairs"]
        assert decision["weights"] == [64 * hidden + hidden * 10, 640]
        assert decision["merged"] is merges
        assert ("ms" in decision) is (rule == "faster")
    ((two, one, difference),) = runs
    assert two == ["Linear", "Identity", "Linear"], "a norm is folded before the pair is timed"
    assert one == ["Identity", "Identity", "Linear"]
    assert difference < 1e-4


def test_a_pair_is_timed_once_and_its_neighbours_anew(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = clock(monkeypatch, 1.0, 2.0)
    layers = [nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)]
    assert not merge_linear(nn.Sequential(nn.Flatten(), *layers), Context(task=task), "faster")
    assert len(runs) == 2
    clock(monkeypatch, 2.0, 1.0)
    context = Context(task=task)
    assert len(merge_linear(nn.Sequential(nn.Flatten(), *layers), context, "faster")) == 2
    assert len(context.record.details["pairs"]) == 2


def test_the_clock_is_real(task: Task) -> None:
    context = Context(task=task)
    merge_linear(pair(512), context, "faster")
    (decision,) = context.record.details["pairs"]
    assert all(entry["median_ms"] > 0 and entry["runs"] >= 3 for entry in decision["ms"])


class Reused(nn.Module):
    """a and b meet, and a is called once more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(64, 64), nn.Linear(64, 10), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.act(self.a(x.flatten(1)))))
        return out


def test_a_layer_that_is_used_elsewhere_stays(task: Task) -> None:
    torch.manual_seed(0)
    model, images = Reused().eval(), next(iter(task.data("val")))[0]
    before = model(images)
    assert not merge_linear(model, Context(task=task))
    assert torch.equal(model(images), before)


class Functional(nn.Module):
    """A batch norm between two layers that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 40), nn.Linear(40, 10)
        self.register_buffer("mean", torch.rand(40))
        self.register_buffer("variance", torch.rand(40) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(nn.functional.batch_norm(self.a(x.flatten(1)), self.mean, self.variance))
        return out


@pytest.mark.parametrize("affine", [True, False])
def test_norms_are_folded_where_they_are_modules(task: Task, affine: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 40), nn.BatchNorm1d(40, affine=affine), nn.Linear(40, 10)]
    layers[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    images = next(iter(task.data("val")))[0]
    for model, merges in ((nn.Sequential(nn.Flatten(), *layers).eval(), True), (Functional().eval(), False)):
        before = model(images)
        assert bool(merge_linear(model, Context(task=task))) is merges
        assert torch.allclose(model(images), before, atol=1e-4)


def test_masks_are_not_merged_away(task: Task) -> None:
    model = Prune(sparsity=0.5)(pair(48))
    context = Context(task=task)
    assert not merge_linear(model, context)
    assert "carries a form (mask)" in context.record.skipped[0]["reason"]


def test_the_rule_travels() -> None:
    recipe = Recipe(steps=(Prune(pattern=Activations(merge="faster")),))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Activations().merge == "smaller"
