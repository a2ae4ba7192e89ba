"""First-order scores: against hand-written derivatives, with masks, frozen weights and groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import NeedError
from espalier.core.forms import Shared
from espalier.core.parametrize import slots
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.data import standard
from espalier.prune import Magnitude, Prune, Sensitivity, Units
from espalier.prune.sensitivity import contribution, gone
from espalier.testing import effective
from espalier.train import Finetune


def problem() -> tuple[nn.Sequential, Context, list[tuple[torch.Tensor, torch.Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
        data = [(torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3) for _ in range(3)]
    return model, Context(task=Task(train=data, val=data)), data


@pytest.mark.parametrize("form", ["gradient", "taylor"])
@pytest.mark.parametrize("against", ["loss", "output"])
def test_by_hand_on_two_layers(form: str, against: str) -> None:
    model, context, data = problem()
    first, last = model[0].weight, model[2].weight
    expected = [torch.zeros_like(first), torch.zeros_like(last)]
    for x, y in data[:2]:
        hidden = F.relu(x @ first.T + model[0].bias)
        out = hidden @ last.T + model[2].bias
        up = (F.softmax(out, 1) - F.one_hot(y, 3)) / 8 if against == "loss" else out / 8  # dL / d out
        grads = [((up @ last) * (hidden > 0)).T @ x, up.T @ hidden]
        for total, grad, weight in zip(expected, grads, (first, last), strict=True):
            total += (grad.abs() if form == "gradient" else (grad * weight) ** 2).detach() / 2
    method = Sensitivity(form=form, against=against, batches=2)
    found = method.scores(model, select(model, ("*",)), context)
    for score, value in zip(found.values(), expected, strict=True):
        assert torch.allclose(score, value, atol=1e-14)
    assert method.needs == ({"train", "labels"} if against == "loss" else {"train"})
    assert method.reduction == "sum"


def test_frozen_weights_are_scored_as_any_and_masked_ones_with_0() -> None:
    model, context, _ = problem()
    want = Sensitivity().scores(model, select(model, ("*",)), context)
    model.requires_grad_(requires_grad=False)
    again = Sensitivity().scores(model, select(model, ("*",)), context)
    assert all(torch.equal(want[name], again[name]) for name in want)
    assert not any(p.requires_grad for p in model.parameters()), "put back"
    masked = Prune(sparsity=0.5)(model)
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    plain.load_state_dict(effective(masked))
    found = Sensitivity(form="gradient").scores(masked, select(masked, ("*",)), context)
    expected = Sensitivity(form="gradient").scores(plain, select(plain, ("*",)), context)
    for name, slot in slots(masked).items():
        if name in found:
            assert bool(expected[name][slot.value() == 0].any()), "a gradient reaches what is gone"
            assert torch.allclose(found[name], expected[name].masked_fill(slot.value() == 0, 0))
            assert torch.equal(gone(slot.form), slot.value() == 0)
    codes = Shared(torch.tensor([[0, 1], [2, 0]]), torch.ones(2), zero=True)
    assert gone(codes).tolist() == [[True, False], [False, True]]
    assert gone(Shared(codes.index, torch.ones(3), zero=False)) is gone(None) is None


def test_batches_that_pull_apart_do_not_cancel() -> None:
    """At a minimum the gradients of the batches sum to nothing; the loss depends on the weight all the same."""
    model = nn.Linear(1, 1, bias=False)
    data = [(torch.ones(4, 1), torch.full((4, 1), y)) for y in (0.0, 2.0)]
    context = Context(task=Task(train=data, val=data, loss=F.mse_loss))
    nn.init.ones_(model.weight)
    assert Sensitivity().scores(model, select(model, ("*",)), context)["weight"].item() == 4
    assert Sensitivity(form="gradient").scores(model, select(model, ("*",)), context)["weight"].item() == 2


def test_kernel() -> None:
    g, w = torch.tensor([2.0, -3.0]), torch.tensor([-1.0, -1.0])
    assert contribution(g, w, "gradient").tolist() == [2, 3]
    assert contribution(g, w, "taylor").tolist() == [4, 9]
    assert contribution(torch.full((1,), 1e-3).half(), torch.full((1,), 1e-2).half(), "taylor").item() > 0


def test_needs_are_named_before_any_work() -> None:
    model, _, data = problem()
    with pytest.raises(NeedError, match="training data"):
        Prune(criterion=Sensitivity())(model, Context(task=Task(val=data)))
    unlabelled = Task(train=[x for x, _ in data], val=[x for x, _ in data])
    with pytest.raises(NeedError, match="labels"):
        Prune(criterion=Sensitivity())(model, Context(task=unlabelled))
    Prune(criterion=Sensitivity(against="output"))(model, Context(task=unlabelled))


def test_beats_magnitude_on_whole_units_of_a_trained_net() -> None:
    """A unit with large weights that the output ignores: first-order scores see it, magnitude does not."""
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    model = Finetune(epochs=4, lr=0.1)(model, context)
    with torch.no_grad():
        model[1].weight[::2] *= 30
        model[1].bias[::2] *= 30
        model[3].weight[:, ::2] *= 1e-4

    def left(criterion: Magnitude | Sensitivity) -> float:
        result = Prune(criterion=criterion, pattern=Units(), layers=("1",), sparsity=0.5)(model, context)
        return context.measure(result).value

    assert left(Sensitivity()) > left(Magnitude()) + 20
