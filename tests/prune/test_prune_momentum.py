"""First moments of gradients and moments of activations: by hand, by NumPy, by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.data import standard
from espalier.prune import Momentum, Prune, Random, Units
from espalier.prune.momentum import Track, powers, standardised
from espalier.train import Finetune


def problem() -> tuple[nn.Sequential, Context, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
        data = [(torch.randn(8, 5).double(), torch.arange(8) % 3) for _ in range(4)]
    return model, Context(task=Task(train=data)), data


def by_hand(
    gradients: list[Tensor], weights: list[Tensor], activations: list[Tensor], decay: float
) -> dict[str, Tensor]:
    moment, size, z, d = (torch.zeros_like(gradients[0]) for _ in range(4))
    for step, (g, w, a) in enumerate(zip(gradients, weights, activations, strict=True)):
        new = decay * moment + (1 - decay) * g
        size += (new * a).abs()
        z += (w * new > 0).double()
        d += (new.sign() * moment.sign() < 0).double() if step else 0
        moment = new
    steps = len(gradients)
    return {"size": size / steps, "toward-zero": 1 - z / steps, "turns": 1 - d / (steps - 1)}


@pytest.mark.parametrize(("level", "at"), [("weights", "output"), ("units", "output"), ("units", "gate")])
@pytest.mark.parametrize("signal", ["size", "toward-zero", "turns", "combined"])
def test_by_hand_on_two_layers(level: str, at: str, signal: str) -> None:
    model, context, data = problem()
    gradients, weights, activations = [], [], []
    for x, y in data:
        pre = model[0](x)
        hidden = F.relu(pre)
        hidden.retain_grad()
        loss = F.cross_entropy(model[2](hidden), y)
        (grad,) = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        (up,) = torch.autograd.grad(loss, hidden)
        hidden = hidden.detach()
        one = torch.ones(4).double()
        g, w, a = {
            ("weights", "output"): (grad, model[0].weight.detach(), model[0].weight.detach()),
            ("units", "output"): (up.mean(0), hidden.mean(0), hidden.abs().mean(0)),
            ("units", "gate"): ((up * hidden).sum(0), one, one),
        }[level, at]
        gradients.append(g), weights.append(w), activations.append(a)
    alone = by_hand(gradients, weights, activations, 0.7)
    expected = alone.get(signal)
    if expected is None:
        expected = alone["size"] * alone["toward-zero"]
        expected = expected + 1e-6 * expected.max() * alone["turns"]
    method = Momentum(level=level, at=at, signal=signal, decay=0.7)
    assert method.of == level
    found = method.scores(model, select(model, ("0",)), context)["0.weight"]
    assert torch.allclose(found, expected, atol=1e-14)
    assert method.needs == {"train", "labels"}


def test_drift_and_turns_of_known_gradients() -> None:
    """Unit 0 is pushed toward zero, 1 away, 2 has no consistent direction, 3 no gradient."""
    track, weight = Track(0.0), torch.tensor([1.0, 1.0, 1.0, 1.0])
    for step in range(6):
        track.update(torch.tensor([1.0, -1.0, (-1.0) ** step, 0.0]), weight, weight)
    assert track.score("toward-zero").tolist() == [0, 1, 0.5, 1]
    assert track.score("turns").tolist() == [1, 1, 0, 1]
    assert track.score("size").tolist() == [1, 1, 1, 0]
    combined = track.score("combined")
    assert combined.argsort().tolist() == [0, 3, 2, 1]
    assert combined.tolist() == pytest.approx([0, 1, 0.5, 0], abs=1e-5)


def test_ties_go_by_turns() -> None:
    track = Track(0.0)
    for step in range(4):
        track.update(torch.tensor([1.0, (-1.0) ** step]), torch.ones(2), torch.zeros(2))
    assert track.score("combined")[1] < track.score("combined")[0], "nothing used, but only one turns"


@given(decay=st.floats(0, 0.99), factor=st.floats(0.1, 10), seed=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_shares_are_shares_and_scale_cancels_in_them(decay: float, factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = Track(decay), Track(decay)
    for _ in range(5):
        g, w = (torch.randn(6, generator=generator).double() for _ in range(2))
        one.update(g, w, w)
        other.update(g * factor, w, w)
    for signal in ("toward-zero", "turns"):
        assert torch.equal(one.score(signal), other.score(signal))
        assert bool(((one.score(signal) >= 0) & (one.score(signal) <= 1)).all())
    assert torch.allclose(one.score("size") * factor, other.score("size"))


def numpy_moment(values: np.ndarray, moment: str) -> np.ndarray:
    mean, centred = values.mean(0), values - values.mean(0)
    spread = (centred**2).mean(0)
    return {
        "mean": np.abs(mean),
        "variance": spread,
        "skewness": np.abs((centred**3).mean(0)) / spread**1.5,
        "kurtosis": (centred**4).mean(0) / spread**2,
    }[moment]


@pytest.mark.parametrize("moment", ["mean", "variance", "skewness", "kurtosis"])
def test_moments_by_numpy(moment: str) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus()).double()
    x = torch.randn(9, 1, 6, 6).double()
    context = Context(task=Task(train=[(x[:5],), (x[5:],)]))
    method = Momentum(moment=moment)
    (found,) = method.scores(conv, select(conv, ("*",)), context).values()
    values = conv(x).detach().movedim(1, -1).reshape(-1, 4).numpy()
    assert np.allclose(found.numpy(), numpy_moment(values, moment), rtol=1e-5)
    assert method.needs == {"train"}, "no labels"


def test_a_constant_goes_first_by_every_moment_but_the_mean() -> None:
    a = torch.randn(50, 3, 4)
    a[:, 1] = 7.1
    means = powers(a).mean(0)
    for moment in ("variance", "skewness", "kurtosis"):
        found = standardised(means, moment)
        assert found[1] == 0
        assert found.argmin() == 1
    assert standardised(means, "mean").argmax() == 1


def test_what_does_not_go_together() -> None:
    with pytest.raises(UsageError, match="use level=units"):
        Momentum(level="weights", moment="variance")
    with pytest.raises(UsageError, match="leave moment=variance unset"):
        Momentum(signal="size", moment="variance")


def test_keeps_more_of_a_trained_net_than_chance() -> None:
    data = standard("digits", seed=0)
    context = Context(task=Task(train=data.train, val=data.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = Finetune(epochs=3, lr=0.1)(model, context)

    def left(criterion: Momentum | Random, **options: object) -> float:
        method = Prune(criterion=criterion, sparsity=0.5, layers=("1",), **options)
        return context.measure(method(model, context)).value

    assert left(Momentum(level="weights", signal="size")) > left(Random())
    assert left(Momentum(moment="variance"), pattern=Units()) > left(Random(), pattern=Units())
