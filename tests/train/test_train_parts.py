"""Schedules, optimizers, penalties, label smoothing and augmentations, each against its formula or torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.conftest import image_task, small_net
from torch import nn
from torch.nn import functional as F

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.parametrize import attach, slots
from espalier.core.task import Task
from espalier.train import (
    L1,
    L2,
    METHODS,
    SGD,
    AdamW,
    Constant,
    Cosine,
    Crop,
    Finetune,
    Flip,
    LabelSmoothing,
    Linear,
    OneCycle,
    Shift,
    Step,
    fit,
)  # fmt: skip
from espalier.train.augmentation import augmented
from espalier.train.penalty import Penalties
from espalier.train.proximal import step_sizes
from espalier.train.state import pack, unpack

fast = settings(deadline=None, max_examples=40)
schedules = st.sampled_from([Constant, Linear, Cosine, Step, OneCycle])


# --- schedules -----------------------------------------------------------------------------------


@fast
@given(schedules, st.floats(0, 1), st.integers(1, 500))
def test_schedules_climb_then_fall_between_zero_and_one(kind, warmup: float, steps: int) -> None:
    schedule = kind(warmup=warmup)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert factors[0] > 0
    warm = math.ceil(warmup * steps)
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert math.isfinite(schedule.factor(steps + 10, steps))  # a loader longer than it said


def test_schedules_by_their_formulas() -> None:
    assert [Linear(final=0.5).factor(s, 4) for s in range(4)] == [1, 0.875, 0.75, 0.625]
    assert [Step(at=(0.5, 0.75), by=0.5).factor(s, 4) for s in range(4)] == [1, 1, 0.5, 0.25]
    assert [Constant(warmup=0.5).factor(s, 8) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    cycle = OneCycle(warmup=0.5, start=0.1, final=0.01)
    assert cycle.factor(500, 1000) == pytest.approx(1)
    assert cycle.factor(0, 1000) == pytest.approx(0.1, abs=1e-4)
    assert cycle.factor(999, 1000) == pytest.approx(0.01, abs=1e-4)


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    for step in range(50):
        assert 0.3 * Cosine(final=0.1).factor(step, 50) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [SGD(nesterov=True, weight_decay=0.1), AdamW()])
def test_channels_last_weights_step_as_plain_ones_do(part) -> None:
    """With a state kept in the plain layout, as after a resume, the fused kernels pair up the wrong elements."""
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    last = nn.Conv2d(3, 4, 3)
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    steps = [part.build(layer.parameters(), 0.1) for layer in (plain, last)]
    for _ in range(3):
        x = torch.randn(2, 3, 5, 5)
        for layer, optimizer in zip((plain, last), steps, strict=True):
            layer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            kept: dict[str, torch.Tensor] = {}
            optimizer.load_state_dict(unpack(pack(optimizer.state_dict(), kept), kept))
    assert torch.allclose(plain.weight, last.weight, atol=1e-5)


def test_conflicts_are_named() -> None:
    with pytest.raises(UsageError, match="nesterov needs momentum above 0"):
        SGD(momentum=0.0, nesterov=True)
    with pytest.raises(UsageError, match="betas must be below 1"):
        AdamW(betas=(0.9, 1.0))


# --- penalties -----------------------------------------------------------------------------------


def gradients(penalties: tuple[L1 | L2, ...], net: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Take(Callback):
        def loss(self, loop, batch, output, loss):
            return loss * 0

        def before_step(self, loop):
            found.update(
                {k: slot.latent.grad.clone() for k, slot in slots(loop.model).items() if slot.latent.requires_grad}
            )

    batch = [next(iter(image_task().train))]
    fit(net, Context(image_task(train=batch)), epochs=1, callbacks=[Take(), Penalties(penalties)])
    return found


def test_penalties_have_the_gradients_of_their_formulas() -> None:
    net = small_net(norm=True)
    weights = {k: v.detach().clone() for k, v in net.named_parameters()}
    grads = gradients((L2(strength=0.25), L2(strength=0.5)), net)
    for name in ("0.weight", "5.weight"):
        assert torch.allclose(grads[name], 2 * (0.25 + 0.5) * weights[name])
    for name in ("0.bias", "1.weight", "1.bias", "5.bias"):  # fewer than two dimensions
        assert torch.equal(grads[name], torch.zeros_like(grads[name]))


def test_penalties_see_effective_weights_and_leave_frozen_ones() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    mask = torch.arange(192).reshape(3, 64) % 2 > 0
    attach(slots(net)["5.weight"], Mask(mask))
    latent = slots(net)["5.weight"].latent.detach().clone()
    grads = gradients((L2(strength=0.5),), net)
    assert torch.allclose(grads["5.weight"], latent * mask)
    assert "0.weight" not in grads


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.0), SGD(momentum=0.9), AdamW(weight_decay=0.0)])
def test_l1_makes_exact_zeros(optimizer) -> None:
    zeros = []
    for penalties in ((), (L1(strength=0.05),)):
        net = Finetune(epochs=8, lr=0.01, optimizer=optimizer, penalties=penalties)(small_net(), Context(image_task()))
        zeros.append(int((net[5].weight == 0).sum()))
        assert bool(net[5].bias.all())
    assert zeros[0] == 0
    assert zeros[1] > 8


def test_l1_is_the_proximal_step_of_gradient_descent() -> None:
    batch = next(iter(image_task().train))
    plain = small_net()
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    technique = Finetune(
        epochs=1, lr=0.1, optimizer=SGD(momentum=0.0), lr_schedule=Constant(), penalties=(L1(strength=0.5),)
    )
    net = technique(small_net(), Context(image_task(train=[batch])))
    moved = plain[5].weight - 0.1 * plain[5].weight.grad
    assert torch.allclose(net[5].weight, moved.sign() * (moved.abs() - 0.1 * 0.5).clamp_min(0), atol=1e-6)
    assert torch.allclose(net[5].bias, plain[5].bias - 0.1 * plain[5].bias.grad, atol=1e-6)


def token_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
def test_l1_erases_no_weight_that_has_had_no_gradient_yet(optimizer) -> None:
    train = [(tokens, tokens) for tokens in torch.arange(100).reshape(10, 10)]
    net = Finetune(epochs=1, optimizer=optimizer, penalties=(L1(),))(token_net(), Context(Task(train=train)))
    sizes = [float(network[0].weight.detach().abs().mean()) for network in (net, token_net())]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_adams_step_has_a_bound_and_is_the_rate_where_there_was_no_gradient() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([weight], 0.1)
    for gradient, steps in (
        (torch.zeros(4), [0.1] * 4),
        (torch.tensor([0.0, 1e-4, 2.0, 4.0]), [0.5, 0.5, 0.05, 0.025]),
    ):
        optimizer.state.clear()
        weight.grad = gradient
        optimizer.step()
        assert torch.allclose(step_sizes(optimizer, weight), torch.tensor(steps), rtol=1e-3)


def test_norms_of_more_than_one_dimension_are_not_penalised() -> None:
    net = nn.Sequential(nn.Flatten(2), nn.LayerNorm([1, 36]), nn.Flatten(), nn.Linear(36, 3))
    grads = gradients((L2(strength=0.5),), net)
    assert not grads["1.weight"].any()
    assert grads["3.weight"].any()


def test_l1_moves_shared_values_along_the_subgradient() -> None:
    batch = next(iter(image_task().train))
    index, centroids = torch.arange(192).reshape(3, 64) % 4, torch.tensor([-0.2, -0.1, 0.1, 0.2])
    moved = []
    for penalties in ((), (L1(strength=0.01),)):
        net = small_net()
        attach(slots(net)["5.weight"], Shared(index, centroids, zero=False))
        technique = Finetune(epochs=1, lr=0.1, optimizer=SGD(momentum=0.0), lr_schedule=Constant(), penalties=penalties)
        moved.append(slots(technique(net, Context(image_task(train=[batch]))))["5.weight"].latent.detach())
    assert torch.allclose(moved[0] - moved[1], 0.1 * 0.01 * 48 * centroids.sign(), atol=1e-6)


# --- label smoothing -----------------------------------------------------------------------------


@fast
@given(st.floats(0, 1), st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_label_smoothing_follows_the_formula(amount: float, classes: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (n,), generator=generator)
    loss = LabelSmoothing(amount=amount).loss(Task(train=[(logits, target)]))
    q = (1 - amount) * F.one_hot(target, classes) + amount / classes
    assert torch.allclose(loss(logits, (logits, target)), -(q * logits.log_softmax(1)).sum(1).mean())


def test_label_smoothing_equals_torch_in_training_and_keeps_the_losss_options() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    theirs = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2, ignore_index=1)
    ours = image_task(loss=nn.CrossEntropyLoss(weight=weight, ignore_index=1))
    one = Finetune(epochs=2, smoothing=LabelSmoothing(amount=0.2))(small_net(), Context(ours))
    two = Finetune(epochs=2)(small_net(), Context(image_task(loss=theirs)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": F.mse_loss}, "the task's loss is mse_loss"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "smooths labels by 0.1 already"),
        ({"loss": type("Focal", (nn.CrossEntropyLoss,), {})()}, "the task's loss is Focal"),
        ({"target": lambda batch: F.one_hot(batch[1], 3).float()}, r"float32 of shape \(48, 3\)"),
    ],
)
def test_label_smoothing_refuses_other_losses_before_any_work(changes: dict, message: str) -> None:
    class Never(Callback):
        def on_start(self, loop):
            raise AssertionError

    with pytest.raises(UsageError, match=message):
        Finetune(smoothing=LabelSmoothing()).train(small_net(), Context(image_task(**changes)), callbacks=[Never()])


# --- augmentations -------------------------------------------------------------------------------

images = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


@fast
@given(images, st.integers(0, 9))
def test_flip_is_an_involution(shape: tuple[int, ...], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flip = Flip(probability=1.0)
    assert torch.equal(flip(x), x.flip(-1))
    assert torch.equal(flip(flip(x)), x)
    assert torch.equal(Flip(probability=0.0)(x), x)


def test_flip_tosses_one_coin_per_image() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2, 3, 4)
    flipped = (Flip(probability=0.25)(x) == x.flip(-1)).flatten(1).all(1)
    assert 60 < int(flipped.sum()) < 140


@fast
@given(images, st.integers(0, 3), st.sampled_from(["zero", "edge"]), st.integers(0, 9))
def test_windows_move_every_image_rigidly_by_at_most_the_reach(shape, reach: int, fill: str, seed: int) -> None:
    """Against brute force: each result is one of the windows of the padded image, for all channels alike."""
    torch.manual_seed(seed)
    x = torch.randn(shape)
    kept = x.clone()
    moved = Crop(padding=reach, fill=fill)(x)
    padded = F.pad(x, [reach] * 4, mode="constant" if fill == "zero" else "replicate")
    assert moved.shape == x.shape
    assert torch.equal(x, kept)
    height, width = shape[2:]
    for image, around in zip(moved, padded, strict=True):
        windows = [around[:, a : a + height, b : b + width] for a in range(2 * reach + 1) for b in range(2 * reach + 1)]
        assert any(torch.equal(image, window) for window in windows)


def test_shift_reaches_every_offset_and_fills_with_zeros() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4000, 1, 7, 7)
    x[:, 0, 3, 3] = 1
    places = Shift(pixels=2)(x).flatten(1)
    assert torch.equal(places.sum(1), torch.ones(4000))
    counts = torch.bincount(places.argmax(1), minlength=49).reshape(7, 7)
    assert counts[1:6, 1:6].min() > 100
    assert counts.sum() == counts[1:6, 1:6].sum()
    corner = torch.ones(500, 1, 2, 2)
    assert set(Shift(pixels=1)(corner).flatten(1).sum(1).tolist()) == {1.0, 2.0, 4.0}


def test_augmentation_finds_the_first_image_of_any_batch() -> None:
    from collections import namedtuple

    pair = namedtuple("pair", "label image")
    x, y = torch.randn(3, 1, 4, 4), torch.arange(3)
    flips = (Flip(probability=1.0),)
    assert torch.equal(augmented((x, y), flips).batch[0], x.flip(-1))
    assert augmented((x, y), flips).other is None
    assert torch.equal(augmented([y, {"mask": x, "second": x}], flips).batch[1]["mask"], x.flip(-1))
    assert torch.equal(augmented([y, {"mask": x, "second": x}], flips).batch[1]["second"], x)
    named = augmented(pair(y, x), flips).batch
    assert type(named) is pair
    assert torch.equal(named.image, x.flip(-1))
    assert torch.equal(augmented(x, (*flips, *flips)).batch, x)


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.id)
def test_every_method_stands_with_its_card(cls) -> None:
    card = cls.card()
    assert card.summary and card.paper and card.formula and card.departs  # noqa: PT018
    assert cls().name == f"train.{cls.id}"
    assert "\\" not in card.summary
