"""What every method with levels of its own keeps: the stored bits, masks, clusters, odd shapes and types, its state."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from espalier.api import fill_registry
from espalier.core.context import Context
from espalier.core.forms import Mask, Shared, from_numpy
from espalier.core.inputs import ActivationQuantizer, Observed, QuantizedInput
from espalier.core.parametrize import plain, slots
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.core.registry import register
from espalier.core.task import Task, classification
from espalier.data import standard
from espalier.graph import trace
from espalier.graph.runner import Runner
from espalier.prune import Channels, Prune
from espalier.quantize import Quantize
from espalier.quantize.apot import APoT, APoTInput
from espalier.quantize.level_sets import look_up, midpoints
from espalier.quantize.levels import Levels
from espalier.quantize.log import Log, LogInput
from espalier.quantize.lq_net import LQNet, LQNetInput
from espalier.quantize.power_of_two import PowerOfTwo
from espalier.quantize.quantile import Quantile
from espalier.quantize.relaxed import Relaxed, RelaxedInput
from espalier.runs.checkpoint import load_model, save_model
from espalier.share import KMeans
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

fill_registry()
register(
    "quantize",
    (PowerOfTwo, Log, LogInput, APoT, APoTInput, LQNet, LQNetInput, Quantile, Levels, Relaxed, RelaxedInput),
)

WEIGHTS: tuple[WeightQuantizer, ...] = (
    PowerOfTwo(), PowerOfTwo(domain="log", per="channel"), Log(), Log(base="sqrt2", fsr="error"), APoT(),
    APoT(base_bits=1, rescale=False), LQNet(), Quantile(), Quantile(values="median"), Quantile(values="even"),
    Quantile(values="normal"), Levels(), Levels(levels=(-2, -1, 0, 1, 2), scale="l2"),
    Levels(range=(-2, 2), scale="max", mode="overwrite"), Relaxed(), Relaxed(estimator="straight-through", reach=None),
)  # fmt: skip
INPUTS: tuple[ActivationQuantizer, ...] = (
    LogInput(), LogInput(base="sqrt2", fsr="error"), APoTInput(), LQNetInput(), RelaxedInput(),
    RelaxedInput(estimator="straight-through"),
)  # fmt: skip


def named(method: object) -> str:
    return repr(method).replace(" ", "")[:60]


each_weight = pytest.mark.parametrize("method", WEIGHTS, ids=named)
each_input = pytest.mark.parametrize("method", INPUTS, ids=named)


@cache
def task() -> Task:
    digits = standard("digits", batch_size=32)
    return classification(digits.train, digits.val, digits.test)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = (nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        return nn.Sequential(*first, nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10))


@cache
def trained() -> nn.Module:
    return Finetune(epochs=4, lr=3e-3)(network(), Context(task=task()))


def accuracy(model: nn.Module) -> float:
    return task().measure(model, "val").value


def distinct(values: Tensor) -> int:
    return len(values.detach().reshape(-1).unique())


@each_weight
def test_it_learns_and_what_is_stored_is_what_ran(method, tmp_path):
    context = Context(task=task())
    step = Quantize(weights=method, bits=3, ends="same", lr=3e-3)
    result = step.replace(epochs=2)(trained(), context).eval()
    untrained = step(trained(), context)
    assert accuracy(result) >= min(accuracy(untrained), 0.9)
    assert accuracy(result) > 0.8
    save_model(result, tmp_path / "kept")
    for other in (frozen_copy(result, through_file=True), load_model(network(), tmp_path / "kept"), plain(result)):
        assert bits(outputs(other, task())) == bits(outputs(result, task()))


@each_weight
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_and_shapes_are_stored_bit_for_bit(method, dtype):
    for shape, axis in (((5,), None), ((4, 1), 0), ((3, 4, 2, 2), 1), ((2, 3, 2), 0), ((6, 5), None), ((1, 1), 0)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for values in (weight, torch.zeros_like(weight)):
            form = QuantizedWeight(method, values, 3, axis=axis).eval()
            effective = form(values)
            assert effective.dtype == dtype
            assert effective.shape == shape
            assert bool(torch.isfinite(effective).all())
            stored = form.freeze(values)
            assert bits(from_numpy(stored.dense(), stored.dtype)) == bits(effective)


@each_weight
def test_all_zero_weights_train_without_nan(method):
    latent = torch.zeros(3, 4, requires_grad=True)
    form = QuantizedWeight(method, latent.detach(), 3).train()
    (form(latent) * torch.randn(3, 4)).sum().backward()
    for tensor in (latent, *form.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


@each_weight
def test_pruned_weights_stay_zero_and_do_not_count(method):
    context = Context(task=task())
    masked = Prune(sparsity=0.7)(network(), context)
    result = Quantize(weights=method, bits=3, ends="same", epochs=1)(masked, context)
    slot = slots(result)["4.weight"]
    form = slot.form
    assert isinstance(form, QuantizedWeight)
    assert isinstance(form.inner, Mask)
    assert not slot.value()[~form.inner.mask].any()
    assert bits(outputs(frozen_copy(result), task())) == bits(outputs(result, task()))
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    kept = torch.arange(48).reshape(6, 8) % 3 > 0
    first, second = (method.start(torch.where(kept, weight, hidden), 3, 0, kept) for hidden in (0.0, 50.0))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_weight
def test_shared_values_stay_shared(method):
    context = Context(task=task())
    clustered = KMeans(bits=4, layers=("4",))(network(), context)
    result = Quantize(weights=method, bits=3, ends="same", epochs=1)(clustered, context).eval()
    slot = slots(result)["4.weight"]
    form, before = slot.form, slots(clustered)["4.weight"].form
    assert isinstance(form, QuantizedWeight)
    assert isinstance(form.inner, Shared)
    assert isinstance(before, Shared)
    assert torch.equal(form.inner.index, before.index)
    assert distinct(slot.value()) <= 9
    assert bits(outputs(frozen_copy(result), task())) == bits(outputs(result, task()))


@pytest.mark.parametrize("method", [LQNet(), PowerOfTwo(per="channel"), APoT(), Quantile(), Relaxed()], ids=named)
def test_channels_can_still_be_removed(method):
    context = Context(task=task())
    result = Quantize(weights=method, bits=3, ends="same")(network(), context).eval()
    smaller = Prune(pattern=Channels(), sparsity=0.5)(result, context)
    assert slots(smaller)["0.weight"].shape[0] == 3
    assert bits(outputs(frozen_copy(smaller), task())) == bits(outputs(smaller, task()))


@each_weight
def test_eval_is_without_chance_and_levels_are_few(method):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    widths = [w for w in (2, 3, 4, 8) if w in method.widths]
    for width in (w for w in widths if not (method.name.endswith("levels") and w == 2)):
        form = QuantizedWeight(method, weight, width).eval()
        first = form(weight)
        torch.rand(7)
        assert bits(form(weight)) == bits(first)
        levels = 2**width * (40 if isinstance(method, LQNet) or getattr(method, "per", "") == "channel" else 1)
        assert distinct(first) <= levels + int(isinstance(method, PowerOfTwo))


# --- inputs --------------------------------------------------------------------------------------------------------


def observed(values: Tensor) -> Observed:
    return Observed(values.reshape(-1), torch.stack(values.aminmax())[None])


@each_input
@pytest.mark.parametrize("signed", [False, True])
def test_inputs_take_few_values_and_gradients_stay_finite(method, signed):
    x = torch.randn(600, generator=torch.Generator().manual_seed(4)) * 3
    x = x if signed else x.relu()
    for width in (2, 3, 4):
        module = QuantizedInput(method, width, observed(x), signed=signed)
        assert distinct(module.eval()(x)) <= 2**width
        assert distinct(module.eval()(2 * x - 1)) <= 2**width
        seen = x.clone().requires_grad_()
        module.train()(seen).square().sum().backward()
        assert seen.grad is not None
        assert seen.grad.abs().max() > 0
        assert all(bool(torch.isfinite(t.grad).all()) for t in (seen, *module.parameters()) if t.grad is not None)


@pytest.mark.parametrize("method", INPUTS[:4], ids=named)
@pytest.mark.parametrize("signed", [False, True])
def test_training_and_use_give_the_same_values(method, signed):
    x = torch.randn(500, generator=torch.Generator().manual_seed(5))
    module = QuantizedInput(method, 3, observed(x if signed else x.relu()), signed=signed)
    before = module.eval()(x)
    assert bits(module.train()(x).detach()) == bits(before)


@each_input
def test_inputs_are_traced_into_the_graph_and_learn(method, tmp_path):
    context = Context(task=task())
    step = Quantize(weights=None, activations=method, activation_bits=4, ends="same", epochs=1, lr=3e-3)
    result = step(trained(), context)
    assert accuracy(result) > 0.85
    example = next(iter(task().data("val")))[0]
    graph = trace(plain(result), (example,))
    assert graph.dynamic
    runner = Runner(graph, {**plain(result).state_dict(), **graph.constants}).eval()
    with torch.no_grad():
        assert torch.allclose(runner(example), result.eval()(example), atol=1e-5)
    save_model(result, tmp_path / "kept")
    for other in (load_model(network(), tmp_path / "kept"), copy.deepcopy(result), frozen_copy(result)):
        assert bits(outputs(other, task())) == bits(outputs(result, task()))


def test_look_up_is_the_nearest_level_without_a_table():
    generator = torch.Generator().manual_seed(6)
    levels = torch.sort(torch.randn(17, generator=generator)).values
    values = torch.randn(4, 500, generator=generator) * 2
    nearest = levels[(values[..., None] - levels).abs().argmin(-1)]
    assert torch.equal(look_up(values, levels, midpoints(levels)), nearest)
