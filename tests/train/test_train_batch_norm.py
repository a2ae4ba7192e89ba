"""Batch norms put in behind trained layers and folded away again; the function stays."""

from __future__ import annotations

import json

import pytest
import torch
from tests.train.conftest import blobs, image_task, small_net
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import NeedError, NoEffectWarning, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.plan import Plan, applied
from espalier.prune import Channels, Global, Prune
from espalier.train import BatchNorm, Finetune

X = blobs().tensors[0]


class Paths(nn.Module):
    """Layers with every reason to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.twice, self.tokens, self.idle = nn.Linear(64, 64), nn.Linear(4, 4), nn.Linear(2, 2)
        self.body, self.head = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2)
        x = self.tokens(x.transpose(1, 2)).flatten(1)
        return self.head(torch.relu(self.body(torch.relu(self.twice(torch.relu(self.twice(x)))))))


def trained(net: nn.Module) -> nn.Module:
    return Finetune(epochs=3, lr=0.02)(net, Context(image_task())).eval()


# --- insert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [None, 2])
def test_inserted_norms_leave_the_function(batches) -> None:
    net = trained(small_net())
    done = BatchNorm(mode="insert", batches=batches)(net, Context(image_task()))
    assert isinstance(done[0].after, nn.BatchNorm2d)
    assert "after" not in done[5]._modules
    assert not any("after" in name for name, _ in net.named_modules())
    with torch.no_grad():
        assert float((done(X) - net(X)).abs().max()) < 1e-5
        assert float((done(100 * X) - net(100 * X)).abs().max()) < 1e-3


def test_inserted_norms_hold_the_statistics_of_their_inputs() -> None:
    net = small_net()
    done = BatchNorm(mode="insert")(net, Context(image_task()))
    with torch.no_grad():
        out = net[0](X)
    norm = done[0].after
    assert torch.allclose(norm.running_mean, out.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.running_var, out.var((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.weight, (norm.running_var + norm.eps).sqrt())
    assert torch.equal(norm.bias, norm.running_mean)
    with torch.no_grad():  # over all samples at once, training normalises by the same numbers
        assert torch.allclose(done.train()(X), net.train()(X), atol=1e-3)


def test_what_gets_no_norm_is_said() -> None:
    context = Context(image_task())
    done = BatchNorm(mode="insert").transform(Paths(), context)
    assert [path for path, _ in done.named_modules() if path.endswith("after")] == ["body.after"]
    assert {row["name"]: row["reason"].split(",")[0] for row in context.record.skipped} == {
        "conv": "its output is normalised already",
        "twice": "it runs 2 times for one answer",
        "tokens": "its channels are not dimension 1 of its output (16",
        "idle": "its forward is not called",
        "head": "it gives the model's answer; name it in layers to normalise that",
    }
    with pytest.warns(NoEffectWarning, match="normalised already"):
        BatchNorm(mode="insert", layers=("body",))(done, Context(image_task()))
    named = BatchNorm(mode="insert", layers=("head",))(Paths(), Context(image_task()))
    assert isinstance(named.head.after, nn.BatchNorm1d)
    with pytest.warns(NoEffectWarning, match="no linear layer or convolution"):
        BatchNorm(mode="insert")(nn.Sequential(nn.Flatten(), nn.LayerNorm(36)), Context(image_task()))


def test_forms_frozen_layers_and_dead_channels() -> None:
    net = small_net()
    mask = torch.ones(4, 1, 3, 3, dtype=torch.bool)
    mask[1] = False
    attach(slots(net)["0.weight"], Mask(mask))
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    done = BatchNorm(mode="insert")(net, Context(image_task()))
    assert not done[0].after.weight.requires_grad
    assert torch.equal(slots(done)["0.weight"].value() != 0, mask)
    with torch.no_grad():
        assert float((done.eval()(X) - net.eval()(X)).abs().max()) < 1e-5


def test_the_edit_is_replayed_trained_and_cut_with_its_layer() -> None:
    context = Context(image_task())
    done = BatchNorm(mode="insert")(trained(small_net()), context)
    data = json.loads(json.dumps(applied(done).to_json()))
    again = Plan.from_json(data).apply(small_net())
    again.load_state_dict(done.state_dict())
    assert torch.equal(again.eval()(X), done.eval()(X))
    smaller = Prune(pattern=Channels(), scope=Global(), sparsity=0.5)(done, context)
    assert smaller[0].after.num_features == 2
    assert context.data.measure(Finetune(epochs=8, lr=0.02)(smaller, context), "val").value > 60


# --- fold ----------------------------------------------------------------------------------------


def test_fold_undoes_insert() -> None:
    net = trained(small_net())
    there = BatchNorm(mode="insert")(net, Context(image_task()))
    back = BatchNorm(mode="fold")(there, Context(image_task()))
    assert isinstance(back[0].after, nn.Identity)
    assert torch.allclose(back[0].weight, net[0].weight, atol=1e-6)
    assert torch.allclose(back[0].bias, net[0].bias, atol=1e-6)
    again = BatchNorm(mode="insert")(back, Context(image_task()))
    assert isinstance(again[0].after, nn.BatchNorm2d)


@pytest.mark.parametrize("masked", [False, True])
def test_fold_keeps_the_function_and_masks(masked: bool) -> None:
    net = trained(nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))  # fmt: skip
    if masked:
        attach(slots(net)["0.weight"], Mask(torch.arange(36).reshape(4, 1, 3, 3) % 2 > 0))
    done = BatchNorm(mode="fold")(net, Context(image_task(train=None)))
    assert [type(done[n]) for n in (1, 5)] == [nn.Identity, nn.Identity]
    with torch.no_grad():
        assert torch.allclose(done(X), net(X), atol=1e-5)
    assert done[0].bias is not None
    if masked:
        assert torch.equal(slots(done)["0.weight"].value() != 0, slots(net)["0.weight"].value() != 0)


def test_norms_that_cannot_be_folded_are_said() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.one, self.two, self.three = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.four = nn.Conv2d(4, 4, 1)
            self.read, self.fed, self.fixed = (nn.BatchNorm2d(4) for _ in range(3))
            self.moving = nn.BatchNorm2d(4, track_running_stats=False)
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            x = self.one(x)
            x = x + self.read(x)
            x = self.fixed(self.two(torch.relu(self.fed(torch.relu(x)))))
            return self.head(self.moving(self.three(x)).flatten(1))

    net = Net()
    attach(slots(net)["two.weight"], Shared(torch.arange(16).reshape(4, 4, 1, 1) % 4, torch.ones(4), zero=False))
    context = Context(image_task())
    BatchNorm(mode="fold").transform(copy_model(net), context)
    assert {row["name"]: row["reason"] for row in context.record.skipped} == {
        "read": "no linear layer or convolution feeds it alone",
        "fed": "no linear layer or convolution feeds it alone",
        "fixed": "the values of two.weight are fixed by an earlier step; fold before it",
        "moving": "no linear layer or convolution feeds it alone",
    }
    with pytest.warns(NoEffectWarning, match="it has no batch-norm layer"):
        BatchNorm(mode="fold")(small_net(), Context(image_task()))
    with pytest.warns(NoEffectWarning, match="0 is not among the chosen layers"):
        BatchNorm(mode="fold", layers=("5",))(small_net(norm=True), Context(image_task()))


def test_fields_without_a_say_and_needs() -> None:
    with pytest.raises(UsageError, match="mode=fold measures nothing"):
        BatchNorm(mode="fold", batches=3)
    with pytest.raises(UsageError, match="leave layers unset"):
        BatchNorm(layers=("0",))
    assert BatchNorm(mode="fold").needs == frozenset()
    with pytest.raises(NeedError, match="training data"):
        BatchNorm(mode="insert")(small_net())
