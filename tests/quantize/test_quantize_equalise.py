"""Cross-layer equalisation: the same function, equal ranges, better rounding; what absorbs a bias and what does not."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.solver_nets import answers, context_for, distance, image_task, mobile
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.plan import Plan, applied
from espalier.core.task import Task
from espalier.quantize import Affine, Quantize
from espalier.quantize.equalise import Equalise, equalising
from espalier.quantize.wiring import Wiring


def task_for(model: nn.Module, *shape: int) -> Task:
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    return Task(train=[(x, torch.arange(8))], val=[(x, torch.arange(8))])


def test_scales_are_the_papers():
    first, second = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 2.0])
    scale = equalising(first, second)
    assert torch.allclose(scale, torch.tensor([2.0, 1 / 3, 1.0], dtype=torch.float64))
    assert torch.allclose((first / scale)[:2], (second * scale)[:2])  # both ranges are sqrt(r1 r2)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU, nn.LeakyReLU])
def test_the_function_stays_and_the_ranges_meet(activation):
    model, task = mobile(activation), image_task()
    context = context_for(task)
    done = Equalise(absorb=False).transform(copy_model(model), context)
    assert torch.allclose(answers(done, task), answers(model, task), atol=1e-5, rtol=1e-5)
    wiring = Wiring(done, context)
    pairs = [(first, wiring.after(first)) for first in wiring.layers()]
    assert len(context.record.details["pairs"]) == 3
    assert [pair is not None for _, pair in pairs] == [True, True, True, False]
    for first, pair in pairs[:3]:
        assert pair is not None
        ranges = first.output_range(), pair[1].input_range(first.slot.shape[0])
        assert torch.allclose(*ranges, rtol=0.02)


def test_it_helps_one_scale_for_a_tensor():
    model, task = mobile(), image_task()
    rounding = Quantize(weights=Affine(per="tensor"), bits=6)
    folded = copy_model(model)
    plain = rounding(Plan(tuple(Wiring(folded, context_for(task)).folds())).apply(folded), Context(task=task))
    better = rounding(Equalise()(model, Context(task=task)), Context(task=task))
    assert distance(better, model, task) < 0.5 * distance(plain, model, task)


def test_flattened_positions_of_a_channel_go_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    task = task_for(model, 2, 6, 6)
    with torch.no_grad():
        model[0].weight[2] *= 50  # type: ignore[index, operator]
    context = context_for(task)
    done = Equalise().transform(copy_model(model), context)
    assert context.record.details["pairs"] == [["0", "4"]]
    assert torch.allclose(answers(done, task), answers(model, task), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(done[0].weight, model[0].weight)  # type: ignore[index]


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        found: Tensor = self.c(torch.tanh(y + self.b(y)))
        return found


def test_what_is_read_twice_or_bent_is_left_alone():
    model = _Branch()
    task = task_for(model, 6)
    context = context_for(task)
    done = Equalise().transform(copy_model(model), context)
    assert context.record.details["pairs"] == []
    assert {row["name"] for row in context.record.skipped} == {"a.weight", "b.weight", "c.weight"}
    assert torch.equal(answers(done, task), answers(model, task))


def test_relu6_becomes_relu_by_an_edit_of_the_plan_or_stops_the_pair():
    model, task = mobile(nn.ReLU6), image_task()
    kept, context = Equalise(relu6=False), context_for(task)
    same = kept.transform(copy_model(model), context)
    assert torch.allclose(answers(same, task), answers(model, task), atol=1e-5, rtol=1e-5)
    assert context.record.details["pairs"] == []
    context = context_for(task)
    done = Equalise(absorb=False).transform(copy_model(model), context)
    assert len(context.record.details["pairs"]) == 3
    assert "ReLU6" in context.record.notes[0]
    unclipped = mobile(nn.ReLU)
    unclipped.load_state_dict(model.state_dict())
    assert torch.allclose(answers(done, task), answers(unclipped, task), atol=1e-5, rtol=1e-5)
    replayed = applied(done).apply(mobile(nn.ReLU6))
    replayed.load_state_dict(done.state_dict())
    assert torch.equal(answers(replayed.eval(), task), answers(done, task))


def absorbing(padding: int = 0) -> nn.Sequential:
    """A channel that lies far above zero (beta = 6, gamma = 1), one that does not, then a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=padding)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))  # type: ignore[operator, union-attr]
        model[0].bias.zero_()  # type: ignore[operator, union-attr]
        model[1].bias.copy_(torch.tensor([6.0, 0.5]))  # type: ignore[operator, union-attr]
    return model


def test_a_bias_far_above_zero_moves_on():
    model = absorbing()
    x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0)).clamp(-2.9, 2.9)
    task = Task(val=[(x, torch.arange(8))])
    done = Equalise().transform(copy_model(model), context_for(task))
    still = Equalise(absorb=False).transform(copy_model(model), context_for(task))
    assert torch.allclose(answers(done, task), answers(model, task), atol=1e-4)
    moved = still[0].bias - done[0].bias  # type: ignore[index]
    gone = still[0].bias[0] * 0.5  # beta - 3 gamma is half of beta, whatever the channel was multiplied with  # type: ignore[index]
    assert torch.allclose(moved, torch.stack([gone, gone * 0]), atol=1e-5)


def test_no_bias_moves_into_a_layer_that_pads():
    model, task = absorbing(padding=1), task_for(nn.Identity(), 2, 5, 5)
    found = [Equalise(absorb=absorb).transform(copy_model(model), context_for(task)) for absorb in (True, False)]
    assert torch.equal(found[0][0].bias, found[1][0].bias)  # type: ignore[index]


def test_masks_are_kept_and_codes_are_not_touched():
    model, task = mobile(), image_task()
    mask = torch.rand(12, 8, 1, 1, generator=torch.Generator().manual_seed(0)) > 0.5
    attach(slots(model)["6.weight"], Mask(mask))
    expected = answers(model, task)
    done = Equalise(absorb=False)(model, Context(task=task))
    assert not slots(done)["6.weight"].value()[~mask].any()
    assert torch.allclose(answers(done, task), expected, atol=1e-5, rtol=1e-5)

    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    linear = task_for(plain, 6)
    coded = Quantize(layers=("0",), ends="same")(plain, Context(task=linear))
    context = context_for(linear)
    done = Equalise().transform(copy_model(coded), context)
    assert context.record.details["pairs"] == [["2", "4"]]
    assert {
        "name": "0.weight",
        "reason": "the values of 0.weight are fixed by an earlier step",
    } in context.record.skipped
    assert torch.equal(slots(done)["0.weight"].value(), slots(coded)["0.weight"].value())


def test_bad_input():
    with pytest.raises(UsageError, match="rounds"):
        Equalise(rounds=0)
