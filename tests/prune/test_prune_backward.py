"""meProp: gradients by hand, counts, simplification, digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prune.sparse_training import accuracy, cnn, digits, mlp, trained
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.model import copy_model
from espalier.core.parametrize import slots
from espalier.core.task import Task
from espalier.prune import Backward
from espalier.prune.backward import top
from espalier.train import SGD, Constant, Finetune

PLAIN = {"epochs": 1, "optimizer": SGD(momentum=0.0, weight_decay=0.0), "lr_schedule": Constant(), "lr": 0.1}


@given(seed=st.integers(0, 100), keep=st.floats(0.01, 1), unified=st.booleans())
@settings(max_examples=30, deadline=None)
def test_top_keeps_the_largest_and_exactly_so_many(seed: int, keep: float, unified: bool) -> None:
    g = torch.randn(4, 11, generator=torch.Generator().manual_seed(seed))
    mask = top(g, keep, unified=unified)
    count = int(mask[0].sum())
    assert max(1, 11 * keep) <= count + 1e-6 < 11 * keep + 1
    assert bool((mask.sum(1) == count).all())
    size = g.abs().sum(0, keepdim=True).expand_as(g) if unified else g.abs()
    for row, chosen in zip(size, mask, strict=True):
        assert float(row[chosen].min()) >= float(row[~chosen].max() if count < 11 else 0)


@pytest.mark.parametrize("unified", [False, True])
def test_one_step_by_hand(unified: bool) -> None:
    """A layer's weight sees the thinned gradient, and so does the layer before it through W^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 5).double(), torch.arange(7) % 3
    a = x @ model[0].weight.T + model[0].bias
    h = a.tanh()
    b = h @ model[2].weight.T + model[2].bias
    k = b.tanh()
    out = k @ model[4].weight.T + model[4].bias
    up = (out.softmax(1) - F.one_hot(y, 3)) / 7

    def thin(g: Tensor, count: int) -> Tensor:
        size = g.abs().sum(0).expand_as(g) if unified else g.abs()
        return g * (size >= size.sort(1, descending=True).values[:, count - 1 : count])

    gb = thin((up @ model[4].weight) * (1 - k**2), 2)
    ga = thin((gb @ model[2].weight) * (1 - h**2), 3)
    context = Context(task=Task(train=[(x, y)], loss=F.cross_entropy))
    result = context.perform(Backward(keep=0.5, unified=unified, **PLAIN), copy_model(model))
    assert torch.allclose(result[4].weight, model[4].weight - 0.1 * up.T @ k)
    assert torch.allclose(result[2].weight, model[2].weight - 0.1 * gb.T @ h)
    assert torch.allclose(result[0].weight, model[0].weight - 0.1 * ga.T @ x)
    record = context.record.details
    assert record["gradients kept"] == {"0.weight": 0.5, "2.weight": 0.5}
    assert record["backward multiply-adds"] == 7 * (6 * 5 + 2 * 4 * 6)  # the first layer's input needs no gradient
    assert record["backward multiply-adds saved"] == record["backward multiply-adds"] / 2
    assert "4.weight" in {row["name"] for row in context.record.skipped}


def test_keeping_all_is_plain_training() -> None:
    splits = digits()
    task = Task(train=list(splits.train)[:5], loss=splits.loss)
    plain = Finetune(**PLAIN)(cnn(), Context(task=task)).state_dict()
    for name, value in Backward(keep=1.0, **PLAIN)(cnn(), Context(task=task)).state_dict().items():
        assert torch.equal(value, plain[name])


def test_sample_of_a_convolution_is_its_feature_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 36, 10)).double()
    x, y = torch.randn(2, 1, 8, 8).double(), torch.tensor([1, 2])
    pre = F.conv2d(x, model[0].weight, model[0].bias).detach().requires_grad_()
    (up,) = torch.autograd.grad(F.cross_entropy(model[2](pre.flatten(1)), y), pre)
    rows = up.flatten(1)
    kept = rows * (rows.abs() >= rows.abs().sort(1, descending=True).values[:, 10:11])  # 11 of 108
    expected = torch.nn.grad.conv2d_weight(x, model[0].weight.shape, kept.reshape(up.shape))
    context = Context(task=Task(train=[(x, y)], loss=F.cross_entropy))
    result = context.perform(Backward(keep=0.1, **PLAIN), copy_model(model))
    assert torch.allclose(result[0].weight, model[0].weight - 0.1 * expected)
    assert context.record.details["backward multiply-adds"] == 2 * 108 * 9


def test_unused_units_are_masked_and_nothing_is_left_on_the_model() -> None:
    """Units whose outgoing weights are zero get no gradient, so they are never chosen."""
    model, silent = copy_model(trained("mlp")), [3, 10, 40]
    with torch.no_grad():
        model[3].weight[:, silent] = 0
    context = Context(task=digits())
    method = Backward(keep=0.3, simplify=1e-4, layers=("1",), **{**PLAIN, "lr": 1e-6})
    result = context.perform(method, model)
    gone = (slots(result)["1.weight"].value() == 0).all(1).nonzero().flatten().tolist()
    assert set(silent) <= set(gone)
    assert len(gone) < 40
    assert context.record.details["sparsity"]["1.weight"] == pytest.approx(len(gone) / 64)
    assert not any(module._forward_hooks for module in result.modules())


def test_digits_learn_from_a_tenth_of_the_gradients() -> None:
    context = Context(task=digits())
    result = context.perform(Backward(epochs=8, lr=3e-3, keep=0.1), mlp())
    assert accuracy(result) > 80
    kept = context.record.details["gradients kept"]
    assert kept == {"1.weight": 7 / 64, "3.weight": 4 / 32}


def test_refusals() -> None:
    with pytest.raises(UsageError, match="keep=0"):
        Backward(keep=0.0)
    with pytest.raises(UsageError, match="epochs=0"):
        Backward(epochs=0)
