"""The loop against a hand-written one, its contract with callbacks, and what bad input gets."""

from __future__ import annotations

import copy
import dataclasses
import random
import time

import numpy as np
import pytest
import torch
from tests.train.conftest import blobs, image_task, small_net, states_equal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import DataError, NeedError, NumericError, UsageError
from espalier.core.metric import Agreement
from espalier.core.task import Task
from espalier.train import SGD, AdamW, Cosine, Flip, Linear, fit
from espalier.train.watch import LossWatch

BATCHES = [tuple(torch.utils.data.default_collate([blobs()[i] for i in range(s, s + 16)])) for s in range(0, 96, 16)]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, rates: list[float]) -> None:
    model.train()
    for step in range(epochs * len(BATCHES)):
        x, y = BATCHES[step % len(BATCHES)]
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "part", [SGD(momentum=0.9, nesterov=True, weight_decay=1e-3), SGD(momentum=0.0), AdamW(betas=(0.8, 0.99))]
)
def test_equals_a_hand_written_torch_loop_bit_for_bit(part: SGD | AdamW) -> None:
    ours, theirs = small_net(norm=True), small_net(norm=True)
    kind = torch.optim.SGD if isinstance(part, SGD) else torch.optim.AdamW
    options = dataclasses.asdict(part)
    fit(ours, Context(image_task(train=BATCHES)), epochs=3, optimizer=part.build(ours.parameters(), 0.05))
    by_hand(theirs, kind(theirs.parameters(), lr=0.05, fused=True, **options), 3, [0.05] * 18)
    assert states_equal(ours, theirs.eval())


def test_schedule_acts_on_every_step() -> None:
    ours, theirs = small_net(), small_net()
    schedule = Cosine(final=0.1)
    fit(
        ours,
        Context(image_task(train=BATCHES)),
        epochs=2,
        optimizer=SGD().build(ours.parameters(), 0.1),
        schedule=schedule,
    )
    rates = [0.1 * schedule.factor(step, 12) for step in range(12)]
    by_hand(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, fused=True), 2, rates)
    assert states_equal(ours, theirs)


def test_adamw_follows_the_formula_of_its_header() -> None:
    w = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    layer = nn.Linear(3, 1, bias=False).double()
    layer.weight.data.copy_(w)
    x, y = torch.tensor([[0.3, -0.1, 2.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    task = Task(train=[(x, y)], loss=F.mse_loss)
    fit(layer, Context(task), epochs=5, optimizer=AdamW(weight_decay=0.1).build(layer.parameters(), 0.01))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 6):
        g = 2 * (x @ w.T - y) * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = (1 - 0.01 * 0.1) * w - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(layer.weight, w, rtol=1e-12)


def test_learns_and_tells_the_history() -> None:
    net = small_net(norm=True)
    result = fit(
        net, Context(image_task()), epochs=12, optimizer=AdamW().build(net.parameters(), 0.02), schedule=Linear()
    )
    assert [row["epoch"] for row in result.history] == list(range(1, 13))
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.history[-1]["score"] > 80
    assert result.history[-1]["lr"] == pytest.approx(0.02 / 72)
    assert all(row["seconds"] > 0 for row in result.history)
    assert (result.stopped, result.best_epoch) == ("", None)


def test_same_seed_same_result_and_the_callers_generators_are_untouched() -> None:
    own = torch.Generator().manual_seed(11)
    task = image_task(train=DataLoader(blobs(), batch_size=16, shuffle=True, generator=own))
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), own.get_state())
    nets = [small_net(dropout=0.5) for _ in range(3)]
    torch.set_rng_state(before[2])
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        fit(net, Context(task, seed=seed), epochs=2)
        own.set_state(before[3])
    assert states_equal(nets[0], nets[1])
    assert not states_equal(nets[0], nets[2])
    fit(nets[0], Context(task), epochs=1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(own.get_state(), before[3])


def test_every_epoch_begins_at_its_own_seed() -> None:
    drawn: list[tuple[float, ...]] = []

    class Draws(Callback):
        def on_epoch_start(self, loop):
            rows = (
                torch.rand(1).item(),
                random.random(),
                np.random.rand(),
                torch.rand(1, generator=loop.generator).item(),
            )
            drawn.append(rows)

    for waste in (0, 3):  # what ran before must not matter
        random.random(), np.random.rand(waste), torch.rand(waste)
        fit(small_net(), Context(image_task()), epochs=3, callbacks=[Draws()])
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn[:3])) == 3
    del drawn[1:]
    fit(small_net(), Context(image_task()), epochs=1, callbacks=[Draws()], name="other")
    fit(small_net(), Context(image_task(), path="01-step"), epochs=1, callbacks=[Draws()])
    assert len({*drawn}) == 3


def test_modes_gradients_and_frozen_parameters() -> None:
    net = small_net(norm=True, dropout=0.2)
    net.eval()
    net[4].train()
    net[0].weight.requires_grad_(False)
    frozen, free = net[0].weight.clone(), net[5].weight.clone()
    seen: list[bool] = []

    class Modes(Callback):
        def before_step(self, loop):
            seen.append(all(module.training for module in loop.model.modules()))

    fit(net, Context(image_task()), epochs=1, callbacks=[Modes()])
    assert all(seen)
    assert len(seen) == 6
    assert [m.training for m in net] == [False, False, False, False, True, False]
    assert torch.equal(net[0].weight, frozen)
    assert not torch.equal(net[5].weight, free)
    assert all(p.grad is None for p in net.parameters())


def test_modes_come_back_after_an_error() -> None:
    net = small_net().eval()

    class Breaks(Callback):
        def after_step(self, loop):
            raise RuntimeError("boom")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        fit(net, Context(image_task()), epochs=1, callbacks=[Breaks()])
    assert not any(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_come_in_order_and_count_steps() -> None:
    calls: list[tuple[str, int, int]] = []

    class Log(Callback):
        def on_start(self, loop):
            assert (loop.steps_per_epoch, loop.steps) == (6, 12)
            calls.append(("start", loop.epoch, loop.step))

        def on_epoch_start(self, loop):
            calls.append(("begin", loop.epoch, loop.step))

        def loss(self, loop, batch, output, loss):
            assert output.shape == (16, 3)
            assert batch[0].shape == (16, 1, 6, 6)
            calls.append(("loss", loop.epoch, loop.step))
            return loss * 2

        def before_step(self, loop):
            assert all(p.grad is not None for p in loop.model.parameters())
            calls.append(("before", loop.epoch, loop.step))

        def after_step(self, loop):
            calls.append(("after", loop.epoch, loop.step))

        def on_epoch(self, loop):
            calls.append(("end", loop.epoch, loop.step))

    plain, doubled = small_net(), small_net()
    one = fit(plain, Context(image_task()), epochs=1)
    two = fit(doubled, Context(image_task()), epochs=2, callbacks=[Log()])
    assert calls[:2] == [("start", 0, 0), ("begin", 0, 0)]
    assert calls[2:5] == [("loss", 0, 0), ("before", 0, 0), ("after", 0, 0)]
    assert calls[20:23] == [("end", 0, 6), ("begin", 1, 6), ("loss", 1, 6)]
    assert calls[-1] == ("end", 1, 12)
    assert two.history[0]["loss"] == pytest.approx(2 * one.history[0]["loss"], rel=0.05)


def test_before_step_has_the_last_word_on_gradients_whatever_their_layout() -> None:
    class Replace(Callback):
        def before_step(self, loop):
            weight = loop.model[5].weight
            weight.grad = torch.arange(192.0).reshape(64, 3).t()

    net = small_net()
    before = net[5].weight.detach().clone()
    fit(net, Context(image_task(train=BATCHES[:1])), epochs=1, clip=1e-9, callbacks=[Replace()],
        optimizer=SGD(momentum=0.0).build(net.parameters(), 0.5))  # fmt: skip
    assert torch.allclose(net[5].weight, before - 0.5 * torch.arange(192.0).reshape(64, 3).t())


def test_clip_bounds_the_norm_of_all_gradients() -> None:
    norms: list[float] = []

    class Norm(Callback):
        def loss(self, loop, batch, output, loss):
            return loss * 1000

        def before_step(self, loop):
            norms.append(torch.cat([p.grad.flatten() for p in loop.model.parameters()]).norm().item())

    fit(small_net(), Context(image_task()), epochs=1, clip=0.25, callbacks=[Norm()])
    assert norms == pytest.approx([0.25] * 6, rel=1e-3)


def test_a_callback_may_train_a_second_model() -> None:
    class Peer(Callback):
        def __init__(self, peer):
            self.peer, self.optimizer = peer, SGD().build(peer.parameters(), 0.05)

        def loss(self, loop, batch, output, loss):
            x, y = batch
            answer = self.peer(x)
            towards = F.kl_div(answer.log_softmax(1), output.detach().softmax(1), reduction="batchmean")
            self.optimizer.zero_grad()
            (F.cross_entropy(answer, y) + towards).backward()
            self.optimizer.step()
            return loss + F.kl_div(output.log_softmax(1), answer.detach().softmax(1), reduction="batchmean")

    peer = small_net(norm=True)
    context = Context(image_task(), models={"peer": peer})
    student = small_net()
    optimizer = AdamW().build(student.parameters(), 0.02)
    result = fit(student, context, epochs=10, callbacks=[Peer(peer)], optimizer=optimizer)
    assert result.history[-1]["score"] > 80
    assert context.data.measure(peer, "val").value > 80


def test_loss_argument_replaces_the_tasks_loss() -> None:
    net = small_net()
    result = fit(net, Context(image_task()), epochs=1, loss=lambda output, batch: output.square().mean() + 5)
    assert 5 < result.history[0]["loss"] < 6


def test_an_unlabelled_task_follows_the_original() -> None:
    images = [x for x, _ in BATCHES]
    original, student = small_net(dropout=0.5), small_net()
    with torch.no_grad():
        original[5].weight.mul_(5)
    context = Context(Task(train=images, val=images), models={"original": original})
    before = copy.deepcopy(original)
    result = fit(student, context, epochs=20, optimizer=AdamW().build(student.parameters(), 0.02))
    assert result.history[-1]["loss"] < 0.1 * result.history[0]["loss"]
    assert result.history[-1]["score"] > 90
    assert states_equal(original, before)
    assert original[4].training
    with pytest.raises(NeedError, match="original"):
        fit(student, Context(Task(train=images)), epochs=1)


def test_val_is_not_scored_where_nothing_can_judge_it() -> None:
    images = [x for x, _ in BATCHES]
    task = Task(train=images, val=images, loss=lambda output, target: output.square().mean())
    assert isinstance(task.scorer(), Agreement)
    assert fit(small_net(), Context(task), epochs=1).history[0]["score"] is None


def test_bf16_autocast_trains_and_keeps_fp32_weights() -> None:
    seen: set[torch.dtype] = set()

    class Types(Callback):
        def loss(self, loop, batch, output, loss):
            seen.add(output.dtype)
            return loss

    net = small_net()
    result = fit(net, Context(image_task()), epochs=6, precision="bf16", callbacks=[Types()],
                 optimizer=AdamW().build(net.parameters(), 0.02))  # fmt: skip
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


class CountOnly:
    """Re-iterable without a length."""

    def __iter__(self):
        return iter(BATCHES)


def test_a_loader_without_length_is_counted() -> None:
    ours, other = small_net(), small_net()
    fit(ours, Context(image_task(train=CountOnly())), epochs=2, schedule=Cosine())
    fit(other, Context(image_task(train=BATCHES)), epochs=2, schedule=Cosine())
    assert states_equal(ours, other)


def test_progress_is_told_and_not_for_every_step() -> None:
    told = []
    slow = [(x, y) for x, y in BATCHES] * 50
    fit(small_net(), Context(image_task(train=slow), listener=told.append), epochs=1)
    assert told[-1].done == told[-1].total == 300
    assert told[-1].values["epoch"] == 1
    assert {"loss", "score"} <= told[-1].values.keys()
    assert len(told) < 100


def test_time_out_ends_the_training_after_an_epoch() -> None:
    context = Context(image_task(), deadline=time.monotonic() - 1)
    result = fit(small_net(), context, epochs=5)
    assert (len(result.history), result.stopped) == (1, "time")
    assert context.record.notes == ["stopped after epoch 1 of 5: the time is up."]
    assert fit(small_net(), Context(image_task(), deadline=0.0), epochs=1).stopped == ""


def test_no_epochs_need_no_data() -> None:
    assert fit(small_net(), Context(), epochs=0).history == []


# --- bad input -----------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_epoch_step_and_rate() -> None:
    bad = [*BATCHES[:2], (torch.full((16, 1, 6, 6), float("nan")), BATCHES[2][1])]
    net = small_net()
    with pytest.raises(
        NumericError, match=r"02-x: the loss is nan in epoch 1 of 4, step 3 of 3, at learning rate 0.001"
    ):
        fit(net, Context(image_task(train=bad), path="02-x"), epochs=4)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())  # stopped before the step


def test_losses_read_in_bulk_name_the_same_step() -> None:
    loop = Loop(small_net(), SGD().build(small_net().parameters()), Context(), torch.Generator(), 2, 5)
    watch = LossWatch(loop, every_step=False)
    for value in (1.0, 2.0, float("inf"), 4.0):
        watch.add(torch.tensor(value, requires_grad=True))
    with pytest.raises(NumericError, match=r"the loss is inf in epoch 1 of 2, step 3 of 5"):
        watch.mean()
    watch = LossWatch(loop, every_step=False)
    for value in (1.0, 2.0, 6.0):
        watch.add(torch.tensor(value, requires_grad=True))
    assert watch.mean() == 3


def test_weights_that_blow_up_are_named_before_they_are_kept() -> None:
    class Blow(Callback):
        def on_epoch(self, loop):
            with torch.no_grad():
                loop.model[5].bias[1] = float("inf")

    with pytest.raises(NumericError, match=r"5.bias holds 1 .* after epoch 1 of 2"):
        fit(small_net(), Context(image_task()), epochs=2, callbacks=[Blow()])


@pytest.mark.parametrize("train", [[], DataLoader(TensorDataset(torch.zeros(3, 1)), batch_size=8, drop_last=True)])
def test_an_empty_loader_is_named(train: object) -> None:
    with pytest.raises(DataError, match="no batch"):
        fit(small_net(), Context(image_task(train=train)), epochs=1)


def test_a_loader_that_dries_up_is_named() -> None:
    class Dries(CountOnly):
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter(BATCHES if self.rounds < 3 else [])

    with pytest.raises(DataError, match="in this epoch"):
        fit(small_net(), Context(image_task(train=Dries())), epochs=5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, target: F.cross_entropy(output, target, reduction="none"), r"shape \(16,\).*mean"),
        (lambda output, target: F.cross_entropy(output, target).item(), "got float"),
        (lambda output, target: None, "NoneType"),
        (lambda output, target: F.cross_entropy(output, target).detach(), "no trainable parameter"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_named(loss: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(small_net(), Context(image_task(loss=loss)), epochs=1)


def test_nothing_to_train_is_named() -> None:
    with pytest.raises(UsageError, match="frozen"):
        fit(small_net().requires_grad_(False), Context(image_task()), epochs=1)


def test_augmentation_without_images_is_named() -> None:
    flat = [(x.flatten(1), y) for x, y in BATCHES]
    with pytest.raises(UsageError, match=r"float32\(16, 36\), int64\(16,\)"):
        fit(nn.Linear(36, 3), Context(image_task(train=flat)), epochs=1, augment=(Flip(),))
