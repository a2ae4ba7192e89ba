"""Sensitivity of groups: the metric is that of the network really without the units; a stopped analysis goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.data import standard
from espalier.graph.channels.surgery import groups_of, remove
from espalier.prune import Channels, Magnitude, Prune
from espalier.prune.analysis import analyse, lowest
from espalier.prune.unit_removal import Removal
from espalier.runs.checkpoint import EpochFile
from espalier.tasks import classification
from espalier.train import Finetune


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Context]:
    torch.manual_seed(0)
    data = standard("digits")
    context = Context(task=classification(data.train, data.val))
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip
    return Finetune(epochs=3, lr=1e-2)(net, context), context


def removal_of(trained: tuple[nn.Module, Context]) -> Removal:
    pattern = Channels()
    method = Prune(pattern=pattern, criterion=Magnitude(norm=2))
    return Removal.of(method, pattern, trained[0], trained[1])


def test_lowest_leaves_one() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
    assert lowest(scores, 0.5).tolist() == [False, True, False, True]
    assert lowest(scores, 0.99).tolist() == [False, True, True, True]
    assert not lowest(scores, 0.2).any()


def test_values_are_those_of_the_network_without_the_units(trained: tuple[nn.Module, Context]) -> None:
    model, context = trained
    found = analyse(removal_of(trained), (0.25, 0.75))
    assert found["full"] == context.measure(model).value
    assert [row["size"] for row in found["groups"]] == [8, 6]
    example = (context.data.example()[0],)
    for row in found["groups"]:
        for level, value in zip((0.25, 0.75), row["values"], strict=True):
            removal = removal_of(trained)
            gone = {row["name"]: lowest(removal.scores()[row["name"]], level)}
            twin = copy.deepcopy(model)
            smaller = remove(twin, groups_of(twin, example), gone, example).model
            assert context.measure(smaller).value == value
    assert min(found["groups"][0]["values"]) < found["full"]


def test_a_stopped_analysis_goes_on(trained: tuple[nn.Module, Context], tmp_path: object) -> None:
    class Stopping(EpochFile):
        def save(self, epoch, tensors, data) -> None:  # type: ignore[no-untyped-def]
            super().save(epoch, tensors, data)
            if epoch == 1:
                raise KeyboardInterrupt

    path = tmp_path / "s.part"  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        analyse(removal_of(trained), (0.5,), store=Stopping(path))
    removal = removal_of(trained)
    seen: list[dict[str, object]] = []
    small = removal.small
    removal.small = lambda chosen: (seen.append(chosen), small(chosen))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    found = analyse(removal, (0.5,), store=EpochFile(path))
    assert [list(chosen) for chosen in seen] == [[], [found["groups"][1]["name"]]]
    assert found == analyse(removal_of(trained), (0.5,))
    other = analyse(removal_of(trained), (0.25,), store=EpochFile(path))  # another question: nothing is taken over
    assert other == analyse(removal_of(trained), (0.25,))


def test_levels_are_checked(trained: tuple[nn.Module, Context]) -> None:
    for levels in ((), (0.0,), (0.5, 1.0)):
        with pytest.raises(UsageError, match="levels are shares above 0 and below 1"):
            analyse(removal_of(trained), levels)


def test_in_the_record_of_a_step(trained: tuple[nn.Module, Context]) -> None:
    from espalier.core.model import copy_model

    model, context = trained
    step = Prune(pattern=Channels(analyse=True), sparsity=0.5)
    child = context.child("prune", step)
    step.transform(copy_model(model), child)
    found = child.record.details["sensitivity"]
    assert [row["name"] for row in found["groups"]] == [row["name"] for row in child.record.details["groups"]]
