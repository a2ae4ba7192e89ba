"""LSQ and LSQ+ against finite differences and the papers' numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.forms import Mask
from espalier.core.inputs import Observed, QuantizedInput
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.representation import Affine as StoredAffine
from espalier.core.task import Task
from espalier.quantize import Quantize
from espalier.quantize.lsq import LSQ, LSQInput
from espalier.train import SGD, AdamW, Finetune


def observed(values: Tensor) -> Observed:
    return Observed(values, torch.stack(values.aminmax())[None])


def value(carrier: QuantizedWeight | QuantizedInput, name: str) -> float:
    return float(carrier.state[name].detach())


def rounded(v: np.ndarray, s: float, low: int, high: int, noise: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """The quantizer with what rounding adds held fixed: its derivatives are those of the straight-through rule."""
    scaled = (v - offset) / s
    inside = (scaled > low) & (scaled < high)
    return s * np.where(inside, scaled + noise, np.clip(scaled, low, high)) + offset


def slope(v: np.ndarray, g: np.ndarray, s: float, low: int, high: int, offset: float = 0.0) -> tuple[float, float]:
    """Finite differences of ``sum(g * quantized)`` in the step and in the offset."""
    noise, h = np.round((v - offset) / s) - (v - offset) / s, 1e-7
    by_step = [float((g * rounded(v, s + d, low, high, noise, offset)).sum()) for d in (-h, h)]
    by_offset = [float((g * rounded(v, s, low, high, noise, offset + d)).sum()) for d in (-h, h)]
    return (by_step[1] - by_step[0]) / (2 * h), (by_offset[1] - by_offset[0]) / (2 * h)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_finite_differences(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 50, generator=generator).requires_grad_()
    flow = torch.randn(6, 50, generator=generator)
    form = QuantizedWeight(LSQ(), weight.detach(), bits)
    half = 2 ** (bits - 1)
    step = value(form, "scale")
    assert math.isclose(step, 2 * float(weight.detach().abs().mean()) / math.sqrt(half - 1), rel_tol=1e-5)
    values = form(weight)
    (values * flow).sum().backward()
    v, g = weight.detach().double().numpy(), flow.double().numpy()
    assert np.allclose(values.detach().numpy(), np.clip(np.round(v / step), -half, half - 1) * step, atol=1e-6)
    expected = slope(v, g, step, -half, half - 1)[0] / math.sqrt(300 * (half - 1))
    assert math.isclose(float(form.state["scale"].grad), expected, rel_tol=1e-3)
    inside = (v / step > -half) & (v / step < half - 1)
    assert weight.grad is not None
    assert np.array_equal(weight.grad.numpy(), np.where(inside, flow.numpy(), 0))


def test_a_step_for_each_channel_sees_its_channel():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 30, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 0.1])[:, None]
    form = QuantizedWeight(LSQ(per="channel"), weight, 3)
    form(weight.clone().requires_grad_()).square().sum().backward()
    for row in range(4):
        alone = QuantizedWeight(LSQ(), weight[row : row + 1], 3)
        alone(weight[row : row + 1].clone().requires_grad_()).square().sum().backward()
        assert torch.allclose(form.state["scale"][row], alone.state["scale"])
        assert torch.allclose(form.state["scale"].grad[row], alone.state["scale"].grad)


def test_pruned_weights_count_nowhere():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) < 0.3
    form, alone = QuantizedWeight(LSQ(), weight, 3, inner=Mask(mask)), QuantizedWeight(LSQ(), weight[mask][None], 3)
    assert torch.allclose(form.state["scale"], alone.state["scale"])
    form(weight.clone().requires_grad_()).sum().backward()
    alone(weight[mask][None].clone().requires_grad_()).sum().backward()
    assert torch.allclose(form.state["scale"].grad, alone.state["scale"].grad, rtol=1e-4)
    plus = QuantizedWeight(LSQ(plus=True), weight, 3, inner=Mask(mask))
    assert torch.allclose(plus.state["scale"], QuantizedWeight(LSQ(plus=True), weight[mask][None], 3).state["scale"])


def test_plus_starts_weights_at_three_deviations():
    weight = torch.randn(5, 80, generator=torch.Generator().manual_seed(3)) - 0.5
    form = QuantizedWeight(LSQ(plus=True), weight, 4)
    mean, deviation = float(weight.mean()), float(weight.std(unbiased=False))
    expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 8
    assert math.isclose(value(form, "scale"), expected, rel_tol=1e-4)


def test_frozen_weights_are_codes_and_one_step():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(4))
    for method in (LSQ(), LSQ(per="channel")):
        form = QuantizedWeight(method, weight, 3).eval()
        stored = form.freeze(weight)
        assert isinstance(stored, StoredAffine)
        assert stored.bits_per_code == 3
        assert np.array_equal(stored.dense(), form(weight).detach().numpy())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_of_inputs_are_finite_differences(bits, signed):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(16, 10, generator=generator)
    x = (x if signed else x.relu()).requires_grad_()
    quantizer = QuantizedInput(LSQInput(), bits, observed(x.detach().flatten()), signed=signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = value(quantizer, "scale")
    assert math.isclose(step, 2 * float(x.detach().abs().mean()) / math.sqrt(high), rel_tol=1e-5)
    flow = torch.randn(16, 10, generator=generator)
    values = quantizer(x)
    (values * flow).sum().backward()
    expected = slope(x.detach().double().numpy(), flow.double().numpy(), step, low, high)[0] / math.sqrt(10 * high)
    assert math.isclose(float(quantizer.state["scale"].grad), expected, rel_tol=1e-3)
    assert torch.allclose(quantizer.eval()(x.detach()), values.detach(), atol=1e-6)


def test_plus_learns_an_offset():
    generator = torch.Generator().manual_seed(5)
    x = torch.nn.functional.silu(torch.randn(32, 20, generator=generator) * 2).requires_grad_()
    quantizer = QuantizedInput(LSQInput(plus=True), 3, observed(x.detach().flatten()), signed=True)
    step, offset = value(quantizer, "scale"), value(quantizer, "offset")
    assert -0.4 < offset < 0
    flow = torch.randn(32, 20, generator=generator)
    values = quantizer(x)
    (values * flow).sum().backward()
    v, g = x.detach().double().numpy(), flow.double().numpy()
    factor = math.sqrt(20 * 7)
    by_step, by_offset = slope(v, g, step, 0, 7, offset)
    assert math.isclose(float(quantizer.state["scale"].grad), by_step / factor, rel_tol=1e-3)
    assert math.isclose(float(quantizer.state["offset"].grad), by_offset / factor, rel_tol=1e-3)
    expected = np.clip(np.round((v - offset) / step), 0, 7) * step + offset
    assert np.allclose(values.detach().numpy(), expected, atol=1e-5)
    assert np.allclose(quantizer.eval()(x).detach().numpy(), expected, atol=1e-5)
    plain = QuantizedInput(LSQInput(), 3, observed(x.detach().flatten()), signed=True).eval()
    x = x.detach()
    assert float((quantizer(x) - x).square().mean()) < 0.5 * float((plain(x) - x).square().mean())


def test_a_step_that_went_below_zero_comes_back():
    form = QuantizedWeight(LSQ(), torch.randn(3, 4), 3)
    with torch.no_grad():
        form.state["scale"].fill_(-0.25)
        form.method.after_step(form.view(torch.zeros(3, 4)), None)  # type: ignore[arg-type]
    assert value(form, "scale") == 0.25
    assert form.state["scale"].requires_grad


@pytest.mark.parametrize("optimizer", [SGD(weight_decay=0.5), AdamW(weight_decay=0.5)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("frozen", [False, True])
def test_weight_decay_leaves_the_steps_alone(optimizer, frozen):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    task = Task(train=[(torch.rand(8, 6), torch.zeros(8))] * 4, loss=lambda output, target: 0 * output.sum())
    step = Quantize(weights=LSQ(), bits=3, activations=LSQInput(), activation_bits=3, ends="same")
    quantized = step(model, Context(task=task))
    if frozen:
        for slot in slots(quantized).values():
            slot.latent.requires_grad_(slot.name.endswith("scale"))
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    result = Finetune(epochs=2, lr=0.1, optimizer=optimizer).transform(quantized, Context(task=task))
    moved = {name for name, tensor in result.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == (set() if frozen else {name for name in before if not name.endswith((".scale", ".zero"))})


def test_one_bit_is_refused():
    with pytest.raises(UsageError, match="lsq can do 2"):
        Quantize(weights=LSQ(), bits=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_plus_starts_at_the_smallest_error_on_values_far_from_zero(sign):
    values = torch.cat([torch.linspace(2, 3, 4000), torch.tensor([9.0])]) * sign
    state = LSQInput(plus=True).start(observed(values), 3, signed=sign < 0)
    scale, offset = (float(state[name].detach()) for name in ("scale", "offset"))

    def error(step: float, start: float) -> float:
        codes = torch.round((values - start) / step).clamp(0, 7)
        return float((codes * step + start - values).square().sum())

    tried = [7 * f / 7 for f in torch.linspace(0.05, 1, 96).tolist()]
    least = min(error(step, 2.0 if sign > 0 else -2 - 7 * step) for step in tried)
    assert error(scale, offset) <= least * 1.05
