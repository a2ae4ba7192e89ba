"""Ternary weights by fixed thresholds and by chance: the formulas, the means, and the quantized back-propagation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import classification
from espalier.quantize import AffineInput, Quantize
from espalier.quantize.quantize import put
from espalier.quantize.ternary import Ternary, fixed_scale
from espalier.quantize.ternary_bernoulli import TernaryBernoulli, bernoulli_codes, power_of_two
from espalier.train import SGD, Constant
from espalier.train.quantizers import QuantizerHooks

VECTORS = [(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]


def test_thresholds_lie_at_half_the_scale():
    weight = torch.tensor([[-2.0, -0.51, -0.5, -0.49], [0.0, 0.5, 0.51, 0.9]])
    form = QuantizedWeight(Ternary(scale="one"), weight, 2)
    assert form(weight).tolist() == [[-1, -1, 0, 0], [0, 0, 1, 1]]


def test_glorot_scale_counts_what_comes_in_and_goes_out():
    assert float(fixed_scale(torch.zeros(30, 20), "glorot")) == pytest.approx(math.sqrt(1.5 / 50))
    assert float(fixed_scale(torch.zeros(8, 4, 3, 3), "glorot")) == pytest.approx(math.sqrt(1.5 / (12 * 9)))
    assert float(fixed_scale(torch.tensor([-0.3, 0.2]), "glorot")) == pytest.approx(0.3)
    assert float(fixed_scale(torch.zeros(30, 20), "one")) == 1


@pytest.mark.parametrize("method", [Ternary(), TernaryBernoulli()])
def test_the_gradient_passes_and_the_latent_weight_is_clipped(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    weight = model[0].weight.detach().clone()
    step = Quantize(
        weights=method, bits=2, ends="same", epochs=1, lr=0.5, lr_schedule=Constant(), optimizer=SGD(momentum=0.0)
    )
    result = step(model, Context(task=classification(VECTORS, VECTORS)))
    slot = slots(result)["0.weight"]
    limit = math.sqrt(1.5 / 9)
    assert isinstance(slot.form, QuantizedWeight)
    assert float(slot.latent.detach().abs().max()) <= limit * (1 + 1e-6)
    if isinstance(method, Ternary):
        x, y = VECTORS[0]
        effective = torch.where(weight.abs() > limit / 2, weight.sign() * limit, 0.0).requires_grad_()
        nn.functional.cross_entropy(x @ effective.T + model[0].bias, y).backward()
        expected = (weight.clamp(-limit, limit) - 0.5 * effective.grad).clamp(-limit, limit)
        assert torch.allclose(slot.latent, expected, atol=1e-6)


@pytest.mark.parametrize("method", [Ternary(), TernaryBernoulli()])
def test_both_scales_start_with_the_same_codes(method):
    torch.manual_seed(0)
    weight = torch.randn(20, 30) / 5
    found = []
    for scale in ("one", "glorot"):
        chosen = method.replace(scale=scale)
        form = QuantizedWeight(chosen, weight, 2).eval()
        found.append(form(form.right_inverse(weight)))
    assert found[0].unique().tolist() == [-1, 0, 1]
    assert torch.equal(found[1], found[0] * fixed_scale(weight, "glorot"))


@pytest.mark.parametrize("scale", ["one", "max"])
def test_right_in_the_mean(scale):
    torch.manual_seed(0)
    weight = torch.rand(4, 50) * 1.6 - 0.8
    form = QuantizedWeight(TernaryBernoulli(scale=scale), weight, 2).train()
    count = 4000
    values = torch.stack([form(weight) for _ in range(count)])
    s = 1.0 if scale == "one" else float(weight.abs().max())
    assert values.unique().tolist() == pytest.approx([-s, 0.0, s])
    deviation = (weight.abs() * s - weight.square()).sqrt() / math.sqrt(count)
    assert ((values.mean(0) - weight).abs() <= 5 * deviation + 1e-6).all()


def test_by_hand_where_the_draw_is_known():
    weight, draw = torch.tensor([0.2, 0.2, -0.9, 0.0]), torch.tensor([0.1, 0.6, 0.6, 0.0])
    assert bernoulli_codes(weight, torch.tensor(0.5), draw).tolist() == [1, 0, -1, 0]
    nearest = QuantizedWeight(TernaryBernoulli(scale="one"), weight[None], 2).eval()
    assert nearest(torch.tensor([[0.51, 0.5, -0.6, 0.0]])).tolist() == [[1, 0, -1, 0]]


def test_the_fixed_draw_belongs_to_the_step_and_the_name():
    def trained(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        step = Quantize(weights=TernaryBernoulli(evaluate="draw"), bits=2, ends="same", epochs=1)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        result = step(model, Context(task=classification(VECTORS, VECTORS), seed=seed))
        return tuple(slots(result)[name].form.state["draw"] for name in ("0.weight", "2.weight"))  # type: ignore[union-attr]

    first, second = trained(0)
    assert torch.equal(first, trained(0)[0])
    assert not torch.equal(first, trained(1)[0])
    assert not torch.equal(first[:3], second)
    assert 0.2 < float(first.mean()) < 0.8


def test_powers_of_two_are_neighbours_and_right_in_the_mean():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(60), torch.tensor([0.0, 1.0, -0.25, 3.0])])
    found = torch.stack([power_of_two(x, torch.rand_like(x)) for _ in range(4000)])
    assert (found[:, 60] == 0).all()
    assert (found[:, 61] == 1).all()
    assert (found[:, 62] == -0.25).all()
    assert found[:, 63].unique().tolist() == [2, 4]
    nonzero = found[:, x != 0]
    assert torch.equal(nonzero.abs().log2(), nonzero.abs().log2().round())
    assert ((found.mean(0) - x).abs() <= 0.05 * x.abs()).all()
    assert float(((found.mean(0) - x).abs() / x.abs().clamp_min(1e-9)).mean()) < 0.01


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 4),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Conv1d(3, 4, 2, padding=1, padding_mode="circular"),
    ],
)
def test_quantized_back_propagation_changes_the_weight_gradient_alone(layer):
    """With inputs that are powers of two nothing changes; with others the gradient is that of q(x), in the mean x's."""
    torch.manual_seed(0)
    shapes = {nn.Linear: (64, 5), nn.Conv2d: (16, 2, 4, 4), nn.Conv1d: (16, 3, 6)}
    shape = shapes[type(layer)]

    def gradients(x: Tensor, backward: str) -> tuple[Tensor, Tensor, Tensor]:
        model = nn.Sequential(layer).train()
        copied = nn.Sequential(type(layer)(*_arguments(layer), **_options(layer)))
        copied.load_state_dict(model.state_dict())
        slot = slots(copied)["0.weight"]
        put(slot, TernaryBernoulli(backward=backward), 2)
        x = x.clone().requires_grad_()
        torch.manual_seed(7)  # the same weights drawn
        with QuantizerHooks(copied):
            output = copied(x)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        return output.detach(), x.grad, slot.latent.grad

    powers = torch.exp2(torch.randint(-3, 2, shape).float())
    for full, rounded in zip(gradients(powers, "full"), gradients(powers, "power-of-two"), strict=True):
        assert torch.allclose(full, rounded, atol=1e-5)
    x = torch.randn(shape)
    full, rounded = gradients(x, "full"), gradients(x, "power-of-two")
    assert torch.equal(full[0], rounded[0])
    assert torch.equal(full[1], rounded[1])
    assert not torch.allclose(full[2], rounded[2], atol=1e-3)
    assert torch.nn.functional.cosine_similarity(full[2].flatten(), rounded[2].flatten(), dim=0) > 0.9


def _arguments(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size[0]  # type: ignore[union-attr, index, return-value]


def _options(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {}
    return {"padding": layer.padding, "groups": layer.groups, "padding_mode": layer.padding_mode}


def test_quantized_back_propagation_with_quantized_inputs():
    """The gradient takes the rounded quantized input: with 1-bit inputs of scale 1 both are powers of two."""
    torch.manual_seed(0)
    x, y = (torch.rand(8, 6) > 0.5).float(), torch.arange(8) % 3
    task = classification([(x, y)], [(x, y)])
    step = Quantize(
        weights=TernaryBernoulli(), activations=AffineInput(), bits=2, activation_bits=1, ends="same", epochs=1,
        optimizer=SGD(momentum=0.0), lr_schedule=Constant(),
    )  # fmt: skip
    found = []
    for backward in ("full", "power-of-two"):
        method = TernaryBernoulli(backward=backward)
        torch.manual_seed(0)
        result = step.replace(weights=method)(nn.Sequential(nn.Linear(6, 3)), Context(task=task))
        found.append(slots(result)["0.weight"].latent.detach())
    assert torch.allclose(*found, atol=1e-6)


def test_refusals():
    with pytest.raises(UsageError, match=r"scale='two'"):
        Ternary(scale="two")
    with pytest.raises(UsageError, match=r"ternary-bernoulli can do 2"):
        Quantize(weights=TernaryBernoulli(), bits=3)
