from __future__ import annotations

import pytest
import torch
from tests.graph.networks import Attention, Dicts, ResNet, Shared
from tests.graph.support import runner_of
from torch import nn
from torch.nn import functional as F

from espalier.core.errors import UnknownNameError
from espalier.graph import Taps, list_places, trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x):
        h = F.relu(self.fc(x))
        h += x
        return self.inner(h) + h.relu() - 1


NAMES = [
    "/input/0", "fc/input/0", "fc/linear/0", "fc/output/0", "/relu/0", "/add/0", "inner/input/0", "inner.0/input/0",
    "inner.0/linear/0", "inner.0/output/0", "inner.1/input/0", "inner.1/relu/0", "inner.1/output/0", "inner/output/0",
    "/relu/1", "/add/1", "/sub/0", "/output/0",
]  # fmt: skip


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_places_of_a_forward_functional_ones_included():
    model, x = Net(), torch.randn(2, 3)
    assert [place.name for place in list_places(model, x)] == NAMES
    assert list_places(model, x) == list_places(model, x)
    assert list_places(model, x)[2].shape == (2, 3)
    assert hooks_of(model) == [0] * 5


def test_names_do_not_depend_on_mode_batch_or_gradients():
    model = ResNet(1)
    train = [p.name for p in list_places(model, torch.randn(2, 3, 32, 32))]
    model.eval()
    with torch.no_grad():
        assert [p.name for p in list_places(model, torch.randn(5, 3, 32, 32))] == train
    assert "layer2.0/add/0" in train
    assert "layer2.0/pad/0" in train


def test_watch_sees_the_values_and_changes_nothing():
    model, x = Net(), torch.randn(2, 3)
    seen = {}
    expected = model(x)
    with Taps(model).watch(["fc/output/0", "*/add/*"], seen.__setitem__):
        assert torch.equal(model(x), expected)
    assert set(seen) == {"fc/output/0", "/add/0", "/add/1"}
    assert torch.equal(seen["fc/output/0"], model.fc(x))


def test_replace_trains_through_the_replacement():
    model, x = Net(), torch.randn(2, 3)
    scale = torch.ones((), requires_grad=True)
    with Taps(model).replace("*/relu/*", lambda _, t: t * scale):
        model(x).sum().backward()
    assert scale.grad is not None
    assert model.fc.weight.grad is not None
    with Taps(model).replace("/output/0", lambda _, t: torch.zeros_like(t)):
        assert model(x).abs().sum() == 0
    with Taps(model).replace("/input/0", lambda _, t: torch.zeros_like(t)):
        assert torch.equal(model(x), model(torch.zeros_like(x)))


def test_calls_inside_the_callback_are_no_places():
    model, x = Net(), torch.randn(2, 3)
    names = []

    def fn(name, t):
        names.append(name)
        return t + 0 * model.fc.weight.sum()

    with Taps(model).replace("*", fn):
        model(x)
    assert names == NAMES


def test_ordinals_start_again_with_every_forward():
    model, x = Net(), torch.randn(2, 3)
    names = []
    with Taps(model).watch("/add/*", lambda name, _: names.append(name)):
        model(x)
        model(x)
    assert names == ["/add/0", "/add/1"] * 2


def test_a_shared_module_and_nested_containers_have_their_own_names():
    names = [p.name for p in list_places(Shared(), torch.randn(2, 6))]
    assert [n for n in names if n.startswith("fc/linear")] == ["fc/linear/0", "fc/linear/1"]
    assert {"/output/0", "/output/1", "/cat/0", "/add/0"} <= set(names)
    call = {"ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.ones(2, 5)}
    names = [p.name for p in list_places(Dicts(), call)]
    assert {"/input/0", "/input/1", "/max/0", "/rsub/0", "/einsum/0"} <= set(names)


def test_blocks_nest():
    model, x = Net(), torch.randn(2, 3)
    inner, outer = [], []
    taps = Taps(model)
    with (
        taps.replace("fc/output/0", lambda _, t: 2 * t),
        taps.watch("/relu/0", lambda _, t: inner.append(t.clone())),
        taps.watch("/relu/0", lambda _, t: outer.append(t.clone())),
    ):
        model(x)
    assert torch.equal(inner[0], F.relu(2 * model.fc(x)))
    assert torch.equal(outer[0], inner[0])


def test_a_pattern_without_a_place_is_an_error():
    model, x = Net(), torch.randn(2, 3)
    with pytest.raises(UnknownNameError, match=r"'/ad/0'.*'/add/0'"), Taps(model).watch("/ad/0", lambda *_: None):
        model(x)
    assert hooks_of(model) == [0] * 5


def test_an_error_in_the_model_leaves_nothing_behind():
    model = Net()
    with pytest.raises(RuntimeError), Taps(model).watch("fc/output/0", lambda *_: None):
        model(torch.randn(2, 4))
    assert hooks_of(model) == [0] * 5
    with Taps(model).watch("fc/output/0", lambda *_: None):
        model(torch.randn(2, 3))


def test_a_runner_has_places_too_and_survives_a_replacement():
    model = Attention().eval()
    x = torch.randn(2, 5, 8)
    runner = runner_of(model, trace(model, (x,)))
    names = [p.name for p in list_places(runner, x)]
    assert "head/linear/0" in names
    assert "/input/0" in names
