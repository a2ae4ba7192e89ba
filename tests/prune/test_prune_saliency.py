"""Saliency of units: against a hand-written derivative, inside every layer, with and without labels."""

from __future__ import annotations

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
from espalier.prune import Global, Prune, Random, Saliency, Units
from espalier.prune.saliency import saliency
from espalier.train import Finetune


@pytest.mark.parametrize("form", ["labels", "input"])
def test_by_hand_on_two_layers(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 5).double(), torch.arange(8) % 3
    hidden = F.relu(model[0](x)).detach()
    out = model[2](hidden).detach()
    up = F.softmax(out, 1) - F.one_hot(y, 3) if form == "labels" else F.one_hot(out.argmax(1), 3).double()
    expected = (hidden * (up @ model[2].weight.detach())).abs().mean(0)
    last = (out * up).abs().mean(0)
    method = Saliency(form=form)
    context = Context(task=Task(train=[(x, y)]))
    found = method.scores(model, select(model, ("*",)), context)
    assert torch.allclose(found["0.weight"].double(), expected / expected.norm(), atol=1e-6)
    assert torch.allclose(found["2.weight"].double(), last / last.norm(), atol=1e-6)
    assert method.needs == ({"train", "labels"} if form == "labels" else {"train"})


@given(seed=st.integers(0, 30), factor=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_kernel_sums_absolute_products_over_positions(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(2, 3, 4, 5, generator=generator).double() for _ in range(2))
    assert torch.allclose(saliency(a, g), (a * g).abs().sum((2, 3)))
    assert torch.allclose(saliency(factor * a, g / factor), saliency(a, g)), "a rescaled unit matters as much"
    assert torch.equal(saliency(a[..., 0, 0], g[..., 0, 0]), (a * g)[..., 0, 0].abs())


def test_a_layer_is_judged_by_its_own_units() -> None:
    """Scaling one layer up and the next one down leaves the function and every score as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    context = Context(task=Task(train=[(torch.randn(8, 5).double(), torch.arange(8) % 3)]))

    def scores() -> dict[str, Tensor]:
        return Saliency().scores(model, select(model, ("*",)), context)

    before = scores()
    with torch.no_grad():
        model[2].weight.mul_(100), model[2].bias.mul_(100), model[4].weight.div_(100)
    after = scores()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert all(score.norm() == pytest.approx(1) for score in after.values())


@pytest.mark.parametrize("form", ["labels", "input"])
def test_keeps_more_of_a_trained_net_than_chance(form: str) -> None:
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)
        )
    model = Finetune(epochs=3, lr=0.1)(model, context)

    def left(criterion: Saliency | Random) -> float:
        method = Prune(criterion=criterion, pattern=Units(), scope=Global(), layers=("1", "3"), sparsity=0.4)
        return context.measure(method(model, context)).value

    assert left(Saliency(form=form)) > left(Random()) + 5
