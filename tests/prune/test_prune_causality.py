"""Causality: bisection, what an intervention sees, and that the walk keeps what it promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError
from espalier.core.forms import Shared
from espalier.core.metric import Loss
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.graph.channels.surgery import groups_of
from espalier.graph.edit import state_of
from espalier.prune import Causality, interventions
from espalier.prune.causality import bisect
from espalier.prune.decisions import decided, wanted
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


# --- what counts as a decision -------------------------------------------------------------------


def test_decisions_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert decided(logits).tolist() == [1, 0]
    assert decided(logits[:, :1]).tolist() == [1, 0], "a single logit decides by its sign"
    assert decided(logits[:, 0] - 0.5).tolist() == [1, 0]
    maps = torch.arange(24.0).sin().reshape(2, 3, 2, 2)
    assert torch.equal(decided(maps), maps.argmax(1))
    assert torch.equal(decided(maps[:, :1]), (maps[:, 0] > 0).long())


@pytest.mark.parametrize("answer", [torch.tensor(1.0), torch.tensor([[1, 2]]), torch.zeros(0, 3)], ids=str)
def test_what_holds_no_logits_is_refused(answer: Tensor) -> None:
    with pytest.raises(ModelError, match=r"first output is .*\(n, classes, \*positions\).*use prune.prune"):
        decided(answer)


def test_labels_become_decisions() -> None:
    logits, maps = torch.zeros(3, 4), torch.zeros(2, 4, 5)
    assert wanted(torch.tensor([3, -100, 255]), logits).tolist() == [3, -1, -1], "what the loss ignores is not compared"
    assert wanted(torch.eye(4)[[2, 0, 1]], logits).tolist() == [2, 0, 1]
    assert wanted(torch.ones(2, 1, 5).long(), maps).tolist() == [[1] * 5] * 2
    for label in (torch.tensor([1.0, 0, 1]), torch.tensor([[True], [False], [True]])):
        assert wanted(label, logits[:, :1]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        (torch.tensor([3.7, 1.0]), torch.zeros(2, 1)),  # a regression
        (torch.zeros(2, 7).long(), torch.zeros(2, 7, 5)),  # tokens with the classes last
        (torch.tensor([[1, 1, 0]]), torch.zeros(1, 3)),  # several labels for one sample
        (torch.zeros(2, 3).long(), torch.zeros(2, 1, 10)),
        ([1, 0], torch.zeros(2, 3)),
        (None, torch.zeros(2, 3)),
    ],
    ids=["regression", "tokens", "labels", "positions", "list", "none"],
)
def test_labels_that_are_no_decisions_are_refused(label: object, answer: Tensor) -> None:
    with pytest.raises(ModelError, match=r"the labels are .*Put the classes at dimension 1"):
        wanted(label, answer)


class Head(nn.Module):
    """A small network whose answers a function puts into shape."""

    def __init__(self, outputs: int, shape) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, outputs)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.last(F.relu(self.first(x))))


def inputs() -> Tensor:
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("against", ["labels", "predictions"])
@pytest.mark.parametrize("shape", [lambda y: y, lambda y: y.squeeze(1)], ids=["column", "flat"])
def test_a_single_logit_decides_by_its_sign(against: str, shape) -> None:
    x = inputs()
    labels = (x[:, :1] + 0.5 * x[:, 1:2] > 0).float()
    loss, data = F.binary_cross_entropy_with_logits, [(x, shape(labels))]
    task = Task(train=data, val=data, loss=loss, metric=Loss(loss))
    model = Finetune(epochs=60, lr=0.05)(Head(1, shape), Context(task=task)).eval()
    context = Context(task=task)
    smaller = Causality(against=against, tolerance=0.02)(model, context)  # type: ignore[arg-type]
    sure = shape(labels) > 0.5 if against == "labels" else model(x) > 0
    before, after = ((m.eval()(x) > 0) == sure for m in (model, smaller))
    assert float(after.float().mean()) >= float(before.float().mean()) - 0.02
    assert 1 < smaller.first.out_features < 16


def test_positions_are_counted_as_decisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = model(x).argmax(1)
    labels[:, 0] = -100
    context = Context(task=Task(train=[(x, labels)], val=[(x, labels)], loss=F.cross_entropy))
    smaller = Causality(tolerance=0.1).transform(copy_model(model), context)
    agreement = context.record.details["agreement"]
    assert (agreement["samples"], agreement["decisions"], agreement["before"]) == (10, 300, 1)
    right = int((smaller(x).argmax(1) == labels).sum())
    assert 270 <= right < 300, "a tenth of the pixels, not of the images, may change"
    assert agreement["after"] == right / 300
    nothing = Context(task=Task(train=[(x, labels * 0 - 100)], val=[(x, labels)], loss=F.cross_entropy))
    with pytest.raises(DataError, match="no label of train names a class"):
        Causality()(model, nothing)


def test_outputs_that_decide_nothing_are_refused() -> None:
    x = inputs()
    blind = Context(task=Task(train=[x], val=[x]))
    for shape in (torch.sigmoid, lambda y: y.sigmoid().squeeze(1)):
        with pytest.raises(ModelError, match=r"all 200 single logits of the model are above 0.*return the logit"):
            Causality(against="predictions")(Head(1, shape), blind)
    with pytest.raises(ModelError, match="no decision can be read"):
        Causality(against="predictions")(Head(3, lambda y: y.argmax(1)), blind)
    smaller = Causality(against="predictions", tolerance=0.1)(Head(10, lambda y: y.unsqueeze(1)), blind)
    before, after = Head(10, lambda y: y)(x) > 0, smaller.eval()(x).squeeze(1) > 0
    assert 0.9 <= float((before == after).float().mean()) < 1, "(n, 1, 10): ten single logits for each sample"
    assert 1 < smaller.first.out_features < 16


def test_weights_that_are_codes_are_ordered_too() -> None:
    """The latent tensor of a shared weight is its table; the gradient is that of the weight all the same."""
    model, x = Head(3, lambda y: y), inputs()
    context = Context(task=Task(train=[(x, torch.arange(200) % 3)]))
    groups = list(groups_of(model, (x,)).groups)
    plain = Causality()._order(model, groups, context)["first"]
    for slot in slots(model).values():
        if len(slot.shape) == 2:
            values, index = slot.value().reshape(-1).unique(return_inverse=True)
            attach(slot, Shared(index.reshape(slot.shape), values, zero=False))
    found = Causality()._order(model, groups, context)["first"]
    assert torch.allclose(found, plain)
    assert bool((found > 0).any())


# --- the same seed, and memory -------------------------------------------------------------------


class Shuffled:
    """Batches in an order drawn from torch's global generator, as a shuffling loader draws it."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())


def test_same_seed_same_network_whatever_the_caller_has_drawn(digits: tuple[nn.Module, Task]) -> None:
    model, task = digits
    batches, found = list(task.data("train")), []
    for seed in (0, 1):
        loader = Shuffled(batches)
        context = Context(task=classification(loader, loader))
        torch.manual_seed(seed)
        smaller = Causality(tolerance=0.03, samples=100).transform(copy_model(model), context)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
        found.append((context.record.details, smaller.state_dict()))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1].values(), found[1][1].values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("limit", [0, 2000, 2**31])
def test_values_go_after_their_last_reader(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """In a chain no more than the value read and the one made are there, however deep it is."""
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 3))
    x, alive = torch.randn(9, 5), list[int]()
    found = groups_of(model, (x,))
    nothing = np.zeros(found.flow.atoms.count, dtype=np.bool_)
    run = interventions.run_node

    def counted(flow, number, values, *args):
        alive.append(len(values))
        return run(flow, number, values, *args)

    monkeypatch.setattr(interventions, "run_node", counted)
    world = Interventions(found, dict(state_of(model)), [[x[:4]], [x[4:8]], [x[8:]]], limit=limit)
    for start in (0, 7, len(found.graph.nodes)):
        world.hold(start, nothing)
        assert torch.allclose(world.outputs(nothing), model(x), atol=1e-6)
        assert all(len(values) == 1 for _, values in world.held)
    assert max(alive) == 1
    world.hold(7, nothing)
    starts = {0: [0, 0, 0], 2000: [7, 7, 7], 2**31: [7, 7, 7]}
    assert [first for first, _ in world.held] == starts[limit]
    world.limit = 100  # 4 rows of 5 floats are 80 bytes
    world.hold(7, nothing)
    assert [first for first, _ in world.held] == [7, 0, 0]
    assert torch.allclose(world.outputs(nothing), model(x), atol=1e-6)
