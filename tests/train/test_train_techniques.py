"""``train.finetune``, early stopping, batch-norm re-estimation; masks and shared codes under training."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from tests.train.conftest import blobs, image_task, small_net, states_equal
from torch import nn
from torch.utils.data import DataLoader

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import DataError, NeedError, NoEffectWarning, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.metric import Loss
from espalier.core.parametrize import attach, slots
from espalier.core.recipe import Recipe
from espalier.train import (
    L1,
    L2,
    SGD,
    AdamW,
    BatchNorm,
    Constant,
    Crop,
    EarlyStopping,
    Finetune,
    Flip,
    LabelSmoothing,
    Training,
    fit,
    reestimate,
)  # fmt: skip


class Watch(Callback):
    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_epoch(self, loop):
        self.states.append(copy.deepcopy(loop.model.state_dict()))


# --- the technique -------------------------------------------------------------------------------


def test_finetune_leaves_its_argument_alone_and_learns() -> None:
    net = small_net(norm=True).eval()
    before, context = copy.deepcopy(net), Context(image_task())
    tuned = Finetune(epochs=10, lr=0.02)(net, context)
    assert states_equal(net, before)
    assert not any(module.training for module in tuned.modules())
    assert context.data.measure(tuned, "val").value > max(80, context.data.measure(net, "val").value)


def test_finetune_writes_its_fields_to_yaml_and_back() -> None:
    step = Finetune(
        epochs=3,
        lr=1e-4,
        optimizer=SGD(momentum=0.8),
        lr_schedule=Constant(warmup=0.1),
        penalties=(L1(), L2(strength=0.1)),
        smoothing=LabelSmoothing(),
        augment=(Flip(), Crop(padding=2)),
        stopping=EarlyStopping(patience=None),
        clip=1.0,
        precision="bf16",
        reestimate=True,
    )
    recipe = Recipe(steps=(step,))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    text = "steps: [{train.finetune: {lr_schedule: one-cycle, stopping: early-stopping, penalties: [l2]}}]"
    (read,) = Recipe.from_yaml(text).steps
    assert isinstance(read, Finetune)
    assert (read.lr_schedule.id, read.stopping, read.penalties) == ("one-cycle", EarlyStopping(), (L2(),))


def test_needs_are_named_before_any_work() -> None:
    assert Finetune().needs == {"train"}
    assert Finetune(stopping=EarlyStopping(), smoothing=LabelSmoothing()).needs == {"train", "val", "labels"}
    assert Finetune(epochs=0, stopping=EarlyStopping(), smoothing=LabelSmoothing()).needs == frozenset()
    with pytest.raises(NeedError, match=r"train.finetune needs .*validation data"):
        Finetune(stopping=EarlyStopping())(small_net(), Context(image_task(val=None)))


def test_no_epochs_change_nothing_and_say_so() -> None:
    with pytest.warns(NoEffectWarning, match="train.finetune changed nothing"):
        Finetune(epochs=0)(small_net(), Context())


def test_penalties_survive_a_callback_that_replaces_the_loss() -> None:
    class Technique(Training):
        id: ClassVar[str] = "test"

        def transform(self, model, context):
            class Zero(Callback):
                def loss(self, loop, batch, output, loss):
                    return output.sum() * 0

            self.train(model, context, callbacks=[Zero()])
            return model

    net = small_net()
    technique = Technique(
        epochs=1, optimizer=SGD(momentum=0.0), lr=0.01, lr_schedule=Constant(), penalties=(L2(strength=0.5),)
    )
    done = technique(net, Context(image_task()))
    assert torch.allclose(done[5].weight, net[5].weight * 0.99**6, atol=1e-6)


def test_bf16_hands_back_the_plain_layout() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    done = Finetune(epochs=2, precision="bf16")(net, Context(image_task()))
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in done.parameters())
    assert not states_equal(net, done)


# --- early stopping ------------------------------------------------------------------------------


class Scripted(Callback):
    """Sets the classifier's bias to the epoch, so that a scripted metric knows it."""

    def on_epoch(self, loop):
        with torch.no_grad():
            loop.model[5].bias.fill_(loop.epoch + 1)


def scripted(scores: list[float], *, higher: bool, stopping: EarlyStopping, settled: int = 0):
    net, epoch = small_net(), [0]

    def read(output, target):
        epoch[0] += 1
        return torch.tensor(scores[epoch[0] - 1])

    metric = Loss(read, "script")
    metric.higher_is_better = higher
    context = Context(image_task(metric=metric))
    optimizer = SGD().build(net.parameters(), 0.01)
    result = fit(net, context, epochs=len(scores), callbacks=[Scripted()], optimizer=optimizer, stopping=stopping,
                 settled=settled)  # fmt: skip
    return result, float(net[5].bias[0].detach())


@pytest.mark.parametrize(
    ("scores", "higher", "patience", "best", "epochs"),
    [
        ([1, 5, 2, 3, 4, 9], True, 3, 2, 5),
        ([1, 5, 2, 3, 4, 9], True, 4, 6, 6),
        ([1, 5, 2, 3, 4, 9], True, None, 6, 6),
        ([9, 5, 5, 5, 4, 9], False, 2, 2, 4),
        ([9, 5, 5, 5, 4, 9], False, 3, 5, 6),
        ([3, 2, 1], True, None, 1, 3),
        ([3, 3, 3], True, 1, 1, 2),
    ],
)
def test_early_stopping_restores_the_best(scores, higher, patience, best, epochs) -> None:
    result, epoch = scripted([float(s) for s in scores], higher=higher, stopping=EarlyStopping(patience=patience))
    assert (result.best_epoch, len(result.history), epoch) == (best, epochs, best)
    assert result.stopped == ("patience" if epochs < len(scores) else "")


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_a_small_gain_is_the_best_but_renews_no_patience(higher: bool, sign: int) -> None:
    scores = [sign * score for score in (1.0, 5.0, 5.5, 6.0, 5.9, 9.0)]
    result, epoch = scripted(scores, higher=higher, stopping=EarlyStopping(patience=3, gain=1.0))
    assert (result.best_epoch, epoch, len(result.history), result.stopped) == (4, 4, 5, "patience")
    result, _ = scripted(scores, higher=higher, stopping=EarlyStopping(patience=3, gain=0.9))
    assert (result.best_epoch, len(result.history)) == (6, 6)
    result, _ = scripted(scores[:3], higher=higher, stopping=EarlyStopping(patience=1, gain=1.0))
    assert (result.best_epoch, len(result.history)) == (3, 3)


def test_gains_add_up_from_the_score_that_renewed_the_patience() -> None:
    scores = [80, 80.4, 80.45, 80.6, 80.7, 80.7, 80.7, 80.7]
    result, _ = scripted(scores, higher=True, stopping=EarlyStopping(patience=3, gain=0.5))
    assert len(result.history) == 7  # the fourth is above 80 + 0.5, and nothing is above 80.6 + 0.5
    assert "better than score_r" in EarlyStopping.card().formula


def test_epochs_before_the_schedule_has_settled_are_no_candidates() -> None:
    result, epoch = scripted([9.0, 8, 7, 1, 2, 1, 1], higher=True, stopping=EarlyStopping(patience=2), settled=3)
    assert (result.best_epoch, epoch, len(result.history)) == (5, 5, 7)
    result, epoch = scripted([9.0, 8, 7], higher=True, stopping=EarlyStopping(patience=1), settled=3)
    assert (result.best_epoch, epoch, result.stopped) == (None, 3, "")


def test_the_best_state_is_the_whole_state() -> None:
    net, watch = small_net(norm=True), Watch()
    result = fit(net, Context(image_task()), epochs=12, callbacks=[watch], stopping=EarlyStopping(patience=None),
                 optimizer=AdamW().build(net.parameters(), 0.1))  # fmt: skip
    scores = [row["score"] for row in result.history]
    assert result.best_epoch == scores.index(max(scores)) + 1
    assert all(torch.equal(v, watch.states[result.best_epoch - 1][k]) for k, v in net.state_dict().items())


# --- batch norm ----------------------------------------------------------------------------------


def deep_norm_net() -> nn.Module:
    torch.manual_seed(5)
    layers = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers)


def test_reestimation_equals_the_statistics_of_the_full_data() -> None:
    net = deep_norm_net().eval()
    before = copy.deepcopy(net)
    data = blobs()
    task = image_task(train=DataLoader(data, batch_size=20, shuffle=True))  # an uneven last batch
    assert reestimate(net, Context(task)) == 2
    x = data.tensors[0]
    assert torch.allclose(net[0].running_mean, x.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(net[0].running_var, x.var((0, 2, 3)), atol=1e-7)
    assert [m.training for m in net] == [False] * 6
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_reestimation_of_a_deeper_layer_over_one_batch_is_that_batch() -> None:
    net = deep_norm_net()
    x = blobs().tensors[0]
    reestimate(net, Context(image_task(train=DataLoader(blobs(), batch_size=96))), batches=1)
    inside = net[1](nn.functional.batch_norm(x, None, None, net[0].weight, net[0].bias, training=True))
    assert torch.allclose(net[3].running_mean, inside.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(net[3].running_var, inside.var((0, 2, 3)), atol=1e-6)


def test_reestimation_takes_the_batches_asked_for() -> None:
    net = deep_norm_net()
    reestimate(net, Context(image_task(train=DataLoader(blobs(), batch_size=16))), batches=2)
    assert torch.allclose(net[0].running_mean, blobs().tensors[0][:32].mean((0, 2, 3)), atol=1e-7)


def test_batch_norm_technique() -> None:
    net = deep_norm_net()
    done = BatchNorm()(net, Context(image_task()))
    assert not torch.equal(done[3].running_var, net[3].running_var)
    context = Context(image_task())
    with pytest.warns(NoEffectWarning, match="no batch-norm layer"):
        BatchNorm()(small_net(), context)
    with pytest.raises(DataError, match="no batch"):
        BatchNorm()(net, Context(image_task(train=[])))
    with pytest.raises(NeedError, match="training data"):
        BatchNorm()(net)


def test_training_reestimates_when_asked() -> None:
    data = DataLoader(blobs(), batch_size=96)
    net = Finetune(epochs=1, reestimate=True)(deep_norm_net(), Context(image_task(train=data)))
    assert torch.allclose(net[0].running_mean, blobs().tensors[0].mean((0, 2, 3)), atol=1e-7)


# --- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.1)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masked_weights_stay_zero(optimizer, precision) -> None:
    net = small_net()
    mask = torch.arange(36).reshape(4, 1, 3, 3) % 3 == 0
    attach(slots(net)["0.weight"], Mask(mask.clone()))
    done = Finetune(epochs=3, lr=0.05, optimizer=optimizer, penalties=(L1(),), precision=precision)(
        net, Context(image_task())
    )
    slot = slots(done)["0.weight"]
    assert torch.equal(slot.value() != 0, mask)
    assert torch.equal(slot.form.mask, mask)
    assert not torch.equal(slot.value(), slots(net)["0.weight"].value())


def test_shared_centroids_receive_the_summed_gradients_of_their_members() -> None:
    batch = next(iter(DataLoader(blobs(), batch_size=96)))
    index = torch.arange(192).reshape(3, 64) % 5
    centroids = torch.linspace(-0.2, 0.2, 4)
    net = small_net()
    attach(slots(net)["5.weight"], Shared(index, centroids, zero=True))
    plain = small_net()
    plain[5].weight.data.copy_(torch.cat([torch.zeros(1), centroids])[index])
    nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
    summed = torch.stack([plain[5].weight.grad[index == symbol].sum() for symbol in range(1, 5)])
    technique = Finetune(epochs=1, lr=0.1, optimizer=SGD(momentum=0.0), lr_schedule=Constant())
    slot = slots(technique(net, Context(image_task(train=[batch]))))["5.weight"]
    assert torch.allclose(slot.latent, centroids - 0.1 * summed, atol=1e-6)
    assert len(slot.value().unique()) == 5
    assert bool((slot.value()[index == 0] == 0).all())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.head(self.two(self.one(x.flatten(1)).relu()).relu())

    net = Tied()
    done = Finetune(epochs=2, stopping=EarlyStopping(patience=None))(net, Context(image_task()))
    assert done.two.weight is done.one.weight
    assert not torch.equal(done.one.weight, net.one.weight)


def test_unknown_part_and_field_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"no field 'epoch'.*epochs"):
        Recipe.from_data([{"train.finetune": {"epoch": 3}}])
    with pytest.raises(UsageError, match="'cosine'"):
        Recipe.from_data([{"train.finetune": {"lr_schedule": "cosin"}}])
