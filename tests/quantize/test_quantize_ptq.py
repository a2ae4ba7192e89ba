"""Bias correction against means computed by hand, and the whole of post-training int8, with and without data."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.solver_nets import answers, context_for, convolutional, digits_task, distance, image_task, mobile
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, NeedError
from espalier.core.forms import Mask
from espalier.core.inputs import quantized_inputs
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, slots
from espalier.core.plan import applied
from espalier.core.task import Task
from espalier.quantize import Quantize
from espalier.quantize.bias_correction import BiasCorrection, clipped_mean, mean_error, patch_mean
from espalier.quantize.equalise import Equalise
from espalier.quantize.gptq import GPTQ
from espalier.quantize.ptq_int8 import PTQInt8, distilled
from espalier.runs.checkpoint import load_model, save_model
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune


def test_clipped_normal_means():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=g, dtype=torch.float64)
    for mean, deviation in ((0.0, 1.0), (1.5, 0.7), (-1.0, 2.0), (5.0, 3.0)):
        values = x * deviation + mean
        at = torch.tensor(mean), torch.tensor(deviation)
        assert float(clipped_mean(*at)) == pytest.approx(float(values.clamp(0).mean()), abs=0.01)
        assert float(clipped_mean(*at, 0, 6)) == pytest.approx(float(values.clamp(0, 6).mean()), abs=0.01)
    assert float(clipped_mean(torch.tensor(2.0), torch.tensor(0.0))) == pytest.approx(2)


@pytest.mark.parametrize("padding", [0, 1])
def test_the_measured_mean_error_is_that_of_the_output(padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=padding, groups=2)).eval()
    x = torch.rand(12, 4, 6, 6)
    task = Task(train=[(x[:8], torch.arange(8)), (x[8:], torch.arange(4))])
    error = torch.randn(6, 2, 3, 3)
    mean = patch_mean(model, slots(model)["0.weight"], Context(task=task), 2)
    assert mean is not None
    expected = torch.conv2d(x.double(), error.double(), None, 1, padding, 1, 2).mean((0, 2, 3))
    assert torch.allclose(mean_error(error, mean, 2), expected)


def test_after_correction_a_layer_gives_the_right_mean():
    model, task = convolutional(), digits_task()
    coarse = Quantize(bits=3, ends="same")(model, Context(task=task))
    done = BiasCorrection(batches=100)(coarse, Context(task=task))
    first = {}
    for name, net in (("float", model), ("coarse", coarse), ("done", done)):
        with torch.no_grad():
            rows = [net[0](batch[0]).double() for batch in task.data("train")]  # type: ignore[index]
        first[name] = torch.cat(rows).mean((0, 2, 3))
    assert (first["coarse"] - first["float"]).abs().max() > 1e-2
    assert torch.allclose(first["done"], first["float"], atol=1e-5)
    assert distance(done, model, task) < distance(coarse, model, task)
    assert torch.equal(slots(done)["0.weight"].value(), slots(coarse)["0.weight"].value())


def test_a_solver_has_its_float_weights_from_the_original_or_is_left_alone():
    model, task = convolutional(), digits_task()
    context = context_for(task, original=model)
    solved = Quantize(weights=GPTQ(), bits=3).transform(copy_model(model), context)
    BiasCorrection().transform(copy_model(solved), context)
    assert len(context.record.details["corrected"]) == 4
    context = context_for(task)
    BiasCorrection().transform(copy_model(solved), context)
    assert {row["reason"] for row in context.record.skipped} == {"its float weights are not known any more"}


@pytest.mark.parametrize("epochs", [0, 1])
def test_weights_that_were_trained_on_their_grid_are_left_alone(epochs, tmp_path):
    model, task = convolutional(), digits_task()
    coarse = Quantize(bits=3, ends="same", epochs=epochs)(model, Context(task=task))
    if not epochs:
        coarse = Finetune(epochs=1)(coarse, Context(task=task))
    save_model(coarse, tmp_path / "kept")
    for kept in (coarse, load_model(model, tmp_path / "kept")):
        context = context_for(task, original=model)
        done = BiasCorrection().transform(copy_model(kept), context)
        assert bits(answers(done, task)) == bits(answers(coarse, task))
        assert [row["name"] for row in context.record.skipped] == ["0.weight", "2.weight", "5.weight", "7.weight"]
        assert all("has been trained since it was quantized" in row["reason"] for row in context.record.skipped)


def test_a_batch_norm_takes_the_correction_of_a_layer_without_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False)).eval()
    x = torch.rand(64, 6)
    task = Task(train=[(x, torch.arange(64) % 3)], val=[(x, torch.arange(64) % 3)])
    coarse = Quantize(bits=2, ends="same")(model, Context(task=task))
    context = context_for(task)
    done = BiasCorrection().transform(copy_model(coarse), context)
    with torch.no_grad():
        means = [net[1](net[0](x)).mean(0) for net in (model, coarse, done)]
    assert not torch.allclose(means[1], means[0], atol=1e-2)
    assert torch.allclose(means[2], means[0], atol=1e-5)
    assert context.record.skipped[0]["name"] == "3.weight"
    assert "no bias" in context.record.skipped[0]["reason"]


def test_norms_tell_the_mean_without_data():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))  # type: ignore[operator, union-attr]
        model[0].bias.copy_(torch.tensor([0.3, -0.5, 2.0]))  # type: ignore[operator, union-attr]
    x = torch.randn(256, 3, 8, 8)
    task = Task(val=[(x, torch.arange(256) % 2)])
    coarse = Quantize(bits=2, ends="same")(model, Context(task=task))
    context = context_for(task)
    done = BiasCorrection(by="norms").transform(copy_model(coarse), context)
    with torch.no_grad():
        means = [net[:3](x).mean((0, 2, 3)) for net in (model, coarse, done)]  # type: ignore[index]
    assert (means[2] - means[0]).abs().max() < 0.05 * (means[1] - means[0]).abs().max()
    assert [row["name"] for row in context.record.skipped] == ["5.weight"]  # no norm before it


def test_int8_of_a_whole_network():
    model, task = mobile(), image_task()
    context = context_for(task, original=model)
    done = PTQInt8().transform(copy_model(model), context)
    assert context.record.details["data-free"] is False
    assert context.record.details["folded"] == ["1", "4", "7"]
    assert set(quantized_inputs(done)) == {"0", "3", "6", "11"}
    signal = answers(model, task)
    noise = answers(done, task) - signal
    assert 10 * torch.log10(signal.var() / noise.square().mean()) > 25  # dB
    assert bits(outputs(done, task)) == bits(outputs(frozen_copy(done), task))
    assert distance(done, model, task) < distance(PTQInt8(correct=None)(model, Context(task=task)), model, task)


def test_the_plan_builds_the_network_anew():
    model, task = mobile(nn.ReLU6), image_task()
    done = PTQInt8(equalise=Equalise())(model, Context(task=task))
    twin = applied(done).apply(mobile(nn.ReLU6))
    assert [type(module) for module in twin.modules()][1:3] == [type(module) for module in frozen_copy(done).modules()][
        1:3
    ]
    assert set(quantized_inputs(twin)) == set(quantized_inputs(done))
    assert all(slot.bias is not None for slot in twin.modules() if isinstance(slot, nn.Conv2d))


@pytest.mark.parametrize("steps", [0, 20])
def test_without_data_it_says_so_and_still_works(steps):
    model, task = mobile(), image_task()
    free = Task(val=task.val)
    context = context_for(free, original=model)
    with pytest.warns(EspalierWarning, match="no training data"):
        done = PTQInt8(steps=steps, batches=4).transform(copy_model(model), context)
    assert context.record.details["data-free"] is True
    signal = answers(model, task)
    assert 10 * torch.log10(signal.var() / (answers(done, task) - signal).square().mean()) > 20  # dB
    with pytest.warns(EspalierWarning):
        again = PTQInt8(steps=steps, batches=4).transform(copy_model(model), context_for(free, original=model))
    assert bits(answers(again, task)) == bits(answers(done, task))


def test_made_up_inputs_come_near_the_batch_norms():
    model = mobile()[:2]
    first: nn.BatchNorm2d = model[1]  # type: ignore[assignment]

    def gap(x: Tensor) -> float:
        with torch.no_grad():
            return float((model[0](x).mean((0, 2, 3)) - first.running_mean).abs().sum())

    x = (torch.zeros(2, 3, 12, 12),)
    plain, fitted = (distilled(model, x, {}, 16, n, torch.Generator().manual_seed(0))[0][0] for n in (0, 60))
    assert plain.shape == fitted.shape == (16, 3, 12, 12)
    assert gap(fitted) < 0.5 * gap(plain)
    assert not fitted.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_pruned_weights_stay_zero():
    model, task = copy_model(convolutional()), digits_task()
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) > 0.6
    attach(slots(model)["5.weight"], Mask(mask))
    done = PTQInt8()(model, Context(task=task))
    assert not slots(done)["5.weight"].value()[~mask].any()


def test_tokens_cannot_be_made_up():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 3))
    task = Task(val=[(torch.arange(12).reshape(4, 3) % 7, torch.arange(4) % 3)])
    with pytest.warns(EspalierWarning), pytest.raises(NeedError, match="real numbers"):
        PTQInt8()(model, Context(task=task))


def test_nothing_quantized_is_nothing_corrected():
    context = context_for(image_task())
    model = BiasCorrection().transform(mobile(), context)
    assert torch.equal(answers(model, image_task()), answers(mobile(), image_task()))
    assert not BiasCorrection().needs
    assert BiasCorrection(by="data").needs == {"train"}
