"""Movement pruning: the paper's sum by hand, revival, and digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.sparse_training import accuracy, digits, trained, zeros
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import NeedError, UsageError
from espalier.core.forms import Mask
from espalier.core.metric import Metric
from espalier.core.parametrize import slots
from espalier.core.selection import select
from espalier.core.task import Task
from espalier.prune import Cubic, Global, Linear, Movement, Prune, Random
from espalier.prune.movement import movement
from espalier.train import SGD, AdamW, Constant, EarlyStopping


def test_sum_of_eq_4_by_hand_with_straight_through_masks() -> None:
    """Plain gradient descent on one batch: S, mask and weight of every step worked out without the library."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 1).double()
    steps, lr = 6, 0.05
    weight = model[0].weight.detach().clone()
    score, mask = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, steps + 1):
        effective = (weight * mask).requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(x @ effective.T, y), effective)
        score = score - weight * gradient
        weight = weight - lr * gradient * mask
        mask = torch.ones_like(mask)  # nothing nests: what went may come back
        mask.view(-1)[score.float().view(-1).argsort()[: int(0.5 * step)]] = False
    method = Prune(
        criterion=Movement(), schedule=Linear(end=1.0), sparsity=0.5, epochs=steps, every=1, lr=lr,
        lr_schedule=Constant(), optimizer=SGD(momentum=0.0, weight_decay=0.0),
    )  # fmt: skip
    task = Task(train=[(x, y)], loss=F.mse_loss)
    result = method(model, Context(task=task))
    slot = slots(result)["0.weight"]
    assert torch.equal(slot.form.mask, mask)
    assert torch.allclose(slot.latent, weight, atol=1e-12)


@given(seed=st.integers(0, 50), lr=st.floats(1e-3, 0.1))
@settings(max_examples=20, deadline=None)
def test_a_step_towards_zero_lowers_the_score_and_a_step_away_raises_it(seed: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(20, generator=generator).double() for _ in range(2))
    moved = (weight - lr * gradient) * weight.sign() - weight.abs()  # how far away from zero
    assert torch.equal(movement(torch.zeros(20).double(), weight, gradient).sign(), moved.sign())


def test_judges_only_what_it_watched() -> None:
    model = trained("mlp")
    with pytest.raises(NeedError, match="epochs"):
        Movement().scores(model, select(model, ("*",)), Context())
    with pytest.raises(UsageError, match="epochs=0"):
        Prune(criterion=Movement(), schedule=Cubic())


def test_digits_beat_random() -> None:
    context = Context(task=digits())
    method = Prune(criterion=Movement(), schedule=Cubic(), scope=Global(), sparsity=0.9, epochs=4, lr=3e-3, every=5)
    result = method(trained("mlp"), context)
    other = method.replace(criterion=Random())(trained("mlp"), Context(task=digits()))
    assert zeros(result) == pytest.approx(0.9, abs=1e-3)
    assert accuracy(result) > accuracy(other) + 5


class Held(Callback):
    """Notes mask and latent weight before and after every step, mask updates included."""

    def __init__(self) -> None:
        self.before: list[tuple[Tensor, Tensor]] = []
        self.after: list[tuple[Tensor, Tensor]] = []

    def before_step(self, loop: Loop) -> None:
        self.before.append(now(loop.model))

    def after_step(self, loop: Loop) -> None:
        self.after.append(now(loop.model))


def now(model: nn.Module) -> tuple[Tensor, Tensor]:
    slot = slots(model)["0.weight"]
    assert isinstance(slot.form, Mask)
    return slot.form.mask.clone(), slot.latent.detach().clone()


class Seen(Prune):
    """Prune with a watch, and the masks as they are before the end."""

    def train(self, model: nn.Module, *args: Any, callbacks: Any = (), **options: Any) -> Any:
        found = super().train(model, *args, callbacks=(*callbacks, HELD[0]), **options)
        MASKS[:] = [now(model)[0]]
        RESULTS[:] = [found]
        return found


HELD, MASKS, RESULTS = [Held()], list[Tensor](), list[Any]()


@pytest.mark.parametrize(
    "optimizer", [SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.5)], ids=lambda o: o.id
)
def test_a_pruned_weight_keeps_the_value_it_had_when_it_went(optimizer: SGD | AdamW) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(12, 6)), torch.randn(16, 12), torch.randn(16, 6)
    HELD[0] = Held()
    method = Seen(
        criterion=Movement(), schedule=Linear(end=0.5), sparsity=0.5, epochs=20, every=2, lr=0.05, optimizer=optimizer
    )
    method(model, Context(task=Task(train=[(x, y)] * 2, loss=F.mse_loss)))
    steps = list(zip(HELD[0].before, HELD[0].after, strict=True))
    assert any(bool((later & ~mask).any()) for (mask, _), (later, _) in steps), "some come back"
    for (mask, latent), (_, after) in steps:
        assert torch.equal(latent[~mask], after[~mask])
        assert not torch.equal(latent[mask], after[mask])


class Falling(Metric):
    """Every measurement is worse than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def per_sample(self, output: Any, target: Any) -> Tensor:
        self.calls += 1
        return torch.full((len(output),), -float(self.calls))


def test_the_best_epoch_keeps_the_masks_it_was_judged_with() -> None:
    """Ranked again by what later epochs saw, its weights would get masks they were never trained with."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(12, 6)), torch.randn(16, 12), torch.randn(16, 6)
    HELD[0] = Held()
    method = Seen(
        criterion=Movement(), schedule=Linear(end=0.3), sparsity=0.5, epochs=10, every=1, lr=0.05,
        stopping=EarlyStopping(patience=None),
    )  # fmt: skip
    task = Task(train=[(x, y)] * 2, val=[(x, y)], loss=F.mse_loss, metric=Falling())
    result = method(model, Context(task=task))
    best = RESULTS[0].best_epoch
    assert 3 < best < 10
    (mask,) = MASKS
    assert torch.equal(mask, HELD[0].after[2 * best - 1][0])
    assert not torch.equal(mask, HELD[0].after[-1][0]), "later epochs would have chosen others"
    assert torch.equal(now(result)[0], mask)
