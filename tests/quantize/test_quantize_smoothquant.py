"""SmoothQuant: the paper's scales, the same function, which layers share one, and which are left alone and why."""

from __future__ import annotations

import math

import pytest
import torch
from tests.quantize.solver_nets import answers, context_for, distance
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError, UnknownNameError
from espalier.core.forms import Mask
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.task import Task
from espalier.quantize import AffineInput, Quantize
from espalier.quantize.smoothquant import SmoothQuant, smoothing


class _Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _Block(nn.Module):
    """Pre-norm attention and a gated MLP, with an outlier channel; (batch, 5, 8) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle, self.up, self.gate, self.down = _Rms(8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.after, self.drop, self.head = nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, 3)
        with torch.no_grad():
            self.before.weight[3], self.middle.weight[5] = 40, 60

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.middle(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        found: Tensor = self.head(self.drop(self.after(x))).mean(1)
        return found


def task() -> Task:
    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
    return Task(train=[(x, torch.arange(16) % 3)], val=[(x, torch.arange(16) % 3)])


def test_scales_are_the_papers():
    inputs, weights = torch.tensor([16.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    assert torch.allclose(smoothing(inputs, weights, 0.5), torch.tensor([4.0, 0.5, 1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(smoothing(inputs, weights, 1.0)[:2], inputs[:2].double())
    assert torch.allclose(smoothing(inputs, weights, 0.0)[:2], 1 / weights[:2].double())


def test_the_function_stays_and_both_sides_have_the_same_range():
    model, data = _Block().eval(), task()
    context = context_for(data)
    done = SmoothQuant().transform(copy_model(model), context)
    assert torch.allclose(answers(done, data), answers(model, data), atol=1e-5, rtol=1e-5)
    assert context.record.details["smoothed"] == {
        "attention.in_proj_weight": "before.weight", "gate.weight": "middle.weight", "up.weight": "middle.weight",
        "head.weight": "after.weight",
    }  # fmt: skip
    reasons = {row["name"]: row["reason"] for row in context.record.skipped}
    assert set(reasons) == {"attention.out_proj.weight", "down.weight"}

    seen: list[Tensor] = []
    handle = done.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answers(done, data)
    handle.remove()
    weights = torch.maximum(done.up.weight.abs().amax(0), done.gate.weight.abs().amax(0))
    assert torch.allclose(seen[0].abs().amax((0, 1)), weights, rtol=1e-3)  # alpha = 1/2 makes them equal


def test_it_helps_quantized_inputs():
    model, data = _Block().eval(), task()
    step = Quantize(activations=AffineInput(), bits=8, activation_bits=6, ends="same", layers=("up", "gate"))
    plain = step(model, Context(task=data))
    smooth = step(SmoothQuant()(model, Context(task=data)), Context(task=data))
    assert distance(smooth, model, data) < 0.5 * distance(plain, model, data)


class _PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.free, self.head = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        found: Tensor = self.head(self.free(y + self.down(self.up(y)))).mean(1)
        return found


def test_a_tensor_that_something_else_reads_is_left_alone():
    model, data = _PostNorm().eval(), task()
    context = context_for(data)
    done = SmoothQuant().transform(copy_model(model), context)
    reasons = {row["name"]: row["reason"] for row in context.record.skipped}
    assert reasons["up.weight"] == "add reads the same tensor"
    assert "head.weight" in reasons  # a norm without a weight has nothing to take a scale
    assert context.record.details["smoothed"] == {"down.weight": "up.weight"}  # linear behind linear
    assert torch.allclose(answers(done, data), answers(model, data), atol=1e-5)


def test_convolutions_behind_a_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(150, 3))
    x = (
        torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 9, 0.1, 3])[:, None, None]
    )
    data = Task(train=[(x, torch.arange(8) % 3)], val=[(x, torch.arange(8) % 3)])
    context = context_for(data)
    done = SmoothQuant(alpha=0.7).transform(copy_model(model.eval()), context)
    assert context.record.details["smoothed"] == {"1.weight": "0.weight"}
    assert torch.allclose(answers(done, data), answers(model, data), atol=1e-5)
    assert not torch.allclose(done[1].weight, model[1].weight)  # type: ignore[index]


def test_masks_are_kept_and_a_part_of_the_layers_is_not_enough():
    model, data = _Block().eval(), task()
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    attach(slots(model)["up.weight"], Mask(mask))
    expected = answers(model, data)
    done = SmoothQuant()(model, Context(task=data))
    assert not slots(done)["up.weight"].value()[~mask].any()
    assert torch.allclose(answers(done, data), expected, atol=1e-5, rtol=1e-5)
    context = context_for(data)
    SmoothQuant(layers=("up", "head")).transform(copy_model(model), context)
    assert context.record.details["smoothed"] == {"head.weight": "after.weight"}
    assert "not among the chosen" in context.record.skipped[0]["reason"]


def test_bad_input():
    model = _Block().eval()
    with pytest.raises(UnknownNameError, match="nothing_of_the_kind"):
        SmoothQuant(layers=("nothing_of_the_kind",))(model, Context(task=task()))
    x = torch.full((4, 5, 8), math.nan)
    with pytest.raises(NumericError, match="NaN"):
        SmoothQuant()(model, Context(task=Task(train=[(x, torch.arange(4) % 3)])))
