"""The average of the weights: its recursion, what is judged and handed back; with forms and after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.train.conftest import StoredContext, image_task, small_net, states_equal
from torch import nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.forms import Mask, Shared
from espalier.core.parametrize import attach, freeze, slots
from espalier.prune import Channels, Cubic, Global, Prune
from espalier.quantize import LSQ, Inq, Quantize
from espalier.train import (
    EMA,
    L1,
    SGD,
    AdamW,
    Constant,
    Cutout,
    EarlyDropout,
    EarlyStopping,
    Finetune,
    Mixup,
    ResizedCrop,
    fit,
)  # fmt: skip
from espalier.train.ema import Average


class Steps(Callback):
    """The state after every step, and where each epoch ended."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.ends: list[int] = []

    def on_start(self, loop):
        self.states.append(copy.deepcopy(loop.model.state_dict()))

    def after_step(self, loop):
        self.states.append(copy.deepcopy(loop.model.state_dict()))

    def on_epoch(self, loop):
        self.ends.append(len(self.states))


def by_hand(states: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The recursion of the card over whole states; integers are those of the last one."""
    mean = {name: value.double() for name, value in states[0].items()}
    for t, state in enumerate(states[1:], 1):
        kept = min(decay, t / (t + 1))
        mean = {name: kept * mean[name] + (1 - kept) * state[name].double() for name in mean}
    last = states[-1]
    return {k: v.to(last[k].dtype) if last[k].is_floating_point() else last[k] for k, v in mean.items()}


def train(net: nn.Module, context: Context, callbacks: list[Callback], **options):
    optimizer = SGD(momentum=0.9).build(net.parameters(), 0.05)
    return fit(net, context, epochs=4, callbacks=callbacks, optimizer=optimizer, **options)


@pytest.mark.parametrize("decay", [0.8, 0.0, 1.0])
def test_result_equals_the_recursion_by_hand(decay: float) -> None:
    steps, net = Steps(), small_net(norm=True)
    train(net, Context(image_task()), [steps], ema=EMA(decay=decay))
    for name, expected in by_hand(steps.states, decay).items():
        assert torch.allclose(net.state_dict()[name], expected, atol=1e-6), name
    if decay == 1:  # Polyak and Ruppert
        mean = torch.stack([state["5.weight"] for state in steps.states]).mean(0)
        assert torch.allclose(net[5].weight, mean, atol=1e-6)


def test_what_is_trained_is_the_same_with_and_without() -> None:
    with_it, without = Steps(), Steps()
    train(small_net(norm=True), Context(image_task()), [with_it], ema=EMA(decay=0.9))
    train(small_net(norm=True), Context(image_task()), [without])
    assert len(with_it.states) == len(without.states) == 25
    for one, other in zip(with_it.states, without.states, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_averaged_weights_are_judged_and_the_best_of_them_handed_back() -> None:
    steps, net, context = Steps(), small_net(norm=True), Context(image_task())
    result = train(net, context, [steps], ema=EMA(decay=0.9), stopping=EarlyStopping(patience=None))
    scores, averages = [], []
    for end in steps.ends:
        judged = small_net(norm=True)
        judged.load_state_dict(by_hand(steps.states[:end], 0.9))
        averages.append(judged)
        scores.append(context.data.measure(judged, "val").value)
    assert [row["score"] for row in result.history] == scores
    best = averages[result.best_epoch - 1]
    for name, value in net.state_dict().items():
        assert torch.allclose(value, best.state_dict()[name], atol=1e-6)


def dressed() -> nn.Module:
    """A mask on the convolution, shared codes on the classifier."""
    net = small_net(dropout=0.3, norm=True)
    attach(slots(net)["0.weight"], Mask(torch.arange(36).reshape(4, 1, 3, 3) % 3 > 0))
    index = torch.arange(192).reshape(3, 64) % 5
    attach(slots(net)["5.weight"], Shared(index, torch.linspace(-0.2, 0.2, 4), zero=True))
    return net


def test_masks_and_shared_codes_hold_and_their_latent_tensors_are_averaged() -> None:
    steps, net = Steps(), dressed()
    train(net, Context(image_task()), [steps], ema=EMA(decay=0.9))
    expected = by_hand(steps.states, 0.9)
    found = slots(net)
    assert torch.equal(found["0.weight"].value() != 0, torch.arange(36).reshape(4, 1, 3, 3) % 3 > 0)
    for name in ("0.weight", "5.weight"):
        latent = expected[f"{name.split('.')[0]}.parametrizations.weight.original"]
        assert torch.allclose(found[name].latent, latent, atol=1e-6)
    assert len(found["5.weight"].value().unique()) == 5


@pytest.mark.parametrize("method", [LSQ(), Inq()])
def test_quantized_weights_stay_on_their_levels(method) -> None:
    step = Quantize(weights=method, bits=2, ends="same", epochs=4, lr=0.01, ema=EMA(decay=0.9))
    net = step(small_net(norm=True), Context(image_task()))
    stored, _ = freeze(net)
    for name in ("0.weight", "5.weight"):
        value = slots(net)[name].value()
        assert len(value.unique()) <= 4
        assert torch.equal(torch.from_numpy(stored[name].dense()).reshape(value.shape), value)


def test_channels_removed_while_training() -> None:
    step = Prune(
        pattern=Channels(), sparsity=0.5, scope=Global(), schedule=Cubic(), epochs=3, every=2, ema=EMA(decay=0.9)
    )
    net = step(small_net(norm=True), Context(image_task()))
    assert net[0].weight.shape == (2, 1, 3, 3)
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())


def test_every_training_takes_one() -> None:
    fields = {"epochs": 4, "lr": 0.05, "optimizer": SGD(momentum=0.9), "lr_schedule": Constant()}
    by_step = Finetune(**fields, ema=EMA(decay=0.9))(small_net(), Context(image_task()))
    by_loop = small_net()
    fit(by_loop, Context(image_task(), path="finetune"), epochs=4, ema=EMA(decay=0.9),
        optimizer=SGD(momentum=0.9).build(by_loop.parameters(), 0.05))  # fmt: skip
    assert states_equal(by_step, by_loop)
    assert not states_equal(by_step, Finetune(**fields)(small_net(), Context(image_task())))


def test_a_tensor_that_changes_its_shape_starts_anew() -> None:
    average, net = Average(EMA(decay=0.5)), nn.Linear(4, 2)
    average.follow(net, 0.0)
    net.weight, net.bias.data = nn.Parameter(torch.ones(2, 3)), torch.full((2,), 3.0)
    before = average.means["bias"].clone()
    average.follow(net, 0.5)
    assert torch.equal(average.means["weight"], torch.ones(2, 3))
    assert torch.allclose(average.means["bias"], before / 2 + 1.5)
    assert average.means["weight"] is not net.weight


def test_frozen_weights_are_left_alone() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    train(net, Context(image_task()), [], ema=EMA(decay=0.5))
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stopping", [None, EarlyStopping(patience=3)])
def test_resumed_equals_uninterrupted(precision: str, stopping) -> None:
    step = Finetune(
        epochs=5,
        lr=0.02,
        optimizer=AdamW(),
        ema=EMA(decay=0.9),
        precision=precision,
        stopping=stopping,
        augment=(ResizedCrop(area=(0.5, 1.0)), Cutout(), Mixup()),
        dropout=EarlyDropout(),
        penalties=(L1(),),
    )
    through = step(dressed(), StoredContext(image_task(), seed=4))
    broken = StoredContext(image_task(), seed=4, stores={})
    for die_after in (1, 2, 3):
        broken.epochs().die_after = die_after
        with pytest.raises(KeyboardInterrupt):
            step(dressed(), broken)
    assert states_equal(through, step(dressed(), broken))
