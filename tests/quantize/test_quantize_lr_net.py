"""LR-nets: probabilities and moments by enumeration, the drawn outputs by counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.quantize.incremental_digits import (
    accuracy,
    check_common,
    check_resumes,
    digits,
    latent_of,
    quantized,
    trained,
    view,
)
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.inputs import QuantizeInput, quantized_inputs
from espalier.core.parametrize import slots
from espalier.core.plan import Plan
from espalier.core.quantized import QuantizedWeight
from espalier.core.task import Task
from espalier.quantize import QATInput, TernaryBernoulli, WeightQuantizer, XNORInput
from espalier.quantize.lr_net import LrNet, likeliest, logits, moments, probabilities, spread_of
from espalier.quantize.quantize import Quantize, put
from espalier.testing.compare import bits
from espalier.train.quantizers import QuantizerHooks


def test_start_by_the_papers_formula() -> None:
    w = torch.tensor([0.0, 0.5, -0.5, 1.7, -1.7])
    plus, minus = probabilities(logits(w, 2))
    zero = 1 - plus - minus
    assert zero.tolist() == pytest.approx([0.95, 0.5, 0.5, 0.05, 0.05])
    assert (plus / (plus + minus)).tolist() == pytest.approx([0.5, 0.95, 0.05, 0.95, 0.05])  # 1 and 0, cut
    assert probabilities(logits(w, 1))[0].tolist() == pytest.approx([0.5, 0.75, 0.25, 0.95, 0.05])
    small = torch.tensor([0.02, -0.03])
    assert moments(logits(small, 2))[0].tolist() == pytest.approx([0.02, -0.03], rel=1e-4)  # E[w] = w
    assert moments(logits(w[:3], 1))[0].tolist() == pytest.approx(w[:3].tolist())


@pytest.mark.parametrize("width", [1, 2])
def test_moments_of_the_output_by_enumeration(width: int) -> None:
    torch.manual_seed(0)
    latent, x = torch.randn(width, 4).double(), torch.randn(4).double()
    plus, minus = probabilities(latent)
    first = second = total = 0.0
    for values in itertools.product([-1, 0, 1], repeat=4):
        p = 1.0
        for i, value in enumerate(values):
            p *= float({1: plus[i], -1: minus[i], 0: 1 - plus[i] - minus[i]}[value])
        y = sum(float(x[i]) * value for i, value in enumerate(values))
        first, second, total = first + p * y, second + p * y * y, total + p
    mean, variance = moments(latent)
    assert total == pytest.approx(1)
    assert float((x * mean).sum()) == pytest.approx(first)
    assert float((x.square() * variance).sum()) == pytest.approx(second - first**2)


def test_likeliest_by_hand() -> None:
    p = torch.tensor([[0.6, 0.1, 0.1, 0.4, 0.34], [0.3, 0.8, 0.2, 0.5, 0.5]]).double()  # P(0), P(1 | not 0)
    assert likeliest(torch.logit(p)).tolist() == [0, 1, -1, 0, 0]  # the rest: 0.4 beats 0.3, 0.34 beats 0.33
    assert likeliest(torch.logit(p[1:])).tolist() == [-1, 1, -1, 1, 1]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_drawn_outputs_have_the_moments(name: str, masked: bool) -> None:
    from espalier.core.forms import Mask
    from espalier.core.parametrize import attach

    make, shape = LAYERS[name]
    torch.manual_seed(2)
    model, x = nn.Sequential(make()), torch.randn(shape)
    slot = slots(model)["0.weight"]
    if masked:
        attach(slot, Mask(torch.rand(slot.latent.shape) > 0.5))
    put(slot, LrNet(eps=1e-8), 2)
    assert isinstance(slot.form, QuantizedWeight)
    with QuantizerHooks(model), torch.no_grad():
        draws = torch.stack([model(x) for _ in range(1500)])
        expected = model.eval()[0].bias  # type: ignore[index]
        mean, variance = moments(slot.latent)
        scale = slot.form.state["scale"]
        kept = slot.form.kept if slot.form.kept is not None else torch.ones_like(mean, dtype=torch.bool)
        plain = make()
        plain.bias.copy_(expected)
        plain.weight.copy_(torch.where(kept, mean * scale, 0))
        middle = plain(x)
        plain.bias.zero_()
        plain.weight.copy_(torch.where(kept, variance * scale.square(), 0))
        deviation = plain(x.square()).sqrt()
    assert float(((draws.mean(0) - middle).abs() - 5 * deviation / 1500**0.5).max()) < 1e-4
    assert torch.allclose(draws.std(0), deviation, rtol=0.12, atol=1e-3)


def test_other_layers_draw_weights() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4, 5, 3), torch.zeros(4, dtype=torch.long))]

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0][:, -1]
            return self.head(out)

    model = Quantize(weights=LrNet(), bits=2, ends="same", epochs=1).transform(
        Last(), Context(task=Task(train=data, loss=lambda output, batch: output.square().mean()))
    )
    draws = {n: bool(s.form.state["draws"]) for n, s in slots(model).items() if isinstance(s.form, QuantizedWeight)}
    assert draws == {"lstm.weight_ih_l0": True, "lstm.weight_hh_l0": True, "head.weight": False}
    form = slots(model)["lstm.weight_ih_l0"].form
    assert isinstance(form, QuantizedWeight)
    form.state["done"].fill_(False)
    latent = slots(model)["lstm.weight_ih_l0"].latent
    mean, variance = moments(latent)
    with torch.no_grad():
        seen = torch.stack([form.train()(latent) for _ in range(3000)]) / form.state["scale"]
    assert torch.allclose(seen.mean(0), mean, atol=0.08)
    assert torch.allclose(seen.var(0), variance, atol=0.08)


def test_a_weight_that_is_used_without_its_layer_is_drawn_from_the_second_step_on() -> None:
    torch.manual_seed(0)
    seen: dict[str, list[bool]] = {"attention.out_proj.weight": [], "taken.weight": [], "head.weight": []}

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.taken, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.attention(x, x, x)[0][:, 0]
            if self.training:
                for name, found in seen.items():
                    found.append(bool((self.used(name) != self.used(name)).any()))
            answer: Tensor = self.head(nn.functional.linear(out, self.taken.weight, self.taken.bias))
            return answer

        def used(self, name: str) -> Tensor:
            value: Tensor = self.get_submodule(name.removesuffix(".weight")).weight  # type: ignore[assignment]
            return value

    data = [(torch.randn(4, 5, 8), torch.zeros(4, dtype=torch.long))] * 3
    Quantize(weights=LrNet(), bits=2, ends="same", epochs=1).transform(
        Attentive(), Context(task=Task(train=data, loss=lambda output, batch: output.square().mean()))
    )
    drawn = [False, True, True]
    assert seen == {"attention.out_proj.weight": drawn, "taken.weight": drawn, "head.weight": [False] * 3}


def test_penalties_by_hand() -> None:
    weight = torch.randn(3, 4)
    ternary, binary = view(LrNet(decay=0.5), weight, 2), view(LrNet(beta=0.5), weight, 1)
    with torch.no_grad():
        decay, undecided = LrNet(decay=0.5).penalty(ternary), LrNet(beta=0.5).penalty(binary)
        assert decay is not None
        assert undecided is not None
        p = torch.sigmoid(binary.latent)
        assert float(decay) == pytest.approx(float(ternary.latent.square().sum()) / 4)
        assert float(undecided) == pytest.approx(float((p * (1 - p)).sum()) / 2)


def test_no_penalty_once_the_values_are_chosen() -> None:
    for width in (1, 2):
        w = view(LrNet(), torch.randn(3, 4), width)
        LrNet().finish(w, Context())
        assert LrNet().penalty(w) is None


def test_the_scale_is_that_of_the_weights_that_are_there() -> None:
    weight = torch.tensor([1.0, -1.0, 0.0, 5.0])
    assert float(spread_of(weight, torch.tensor([True, True, True, False]))) == pytest.approx(1)
    assert float(spread_of(torch.full((3,), -0.5), None)) == pytest.approx(0.5)


@pytest.mark.parametrize("width", [1, 2])
def test_it_learns(width: int) -> None:
    at_once = quantized(trained(), LrNet(), width)
    fitted = quantized(trained(), LrNet(), width, epochs=20, lr=3e-2)
    assert accuracy(fitted) > max(0.75, accuracy(at_once))
    slot, _ = latent_of(fitted, "4.weight")
    assert slot.latent.shape == (width, *slot.shape)
    assert len(slot.value().unique()) <= width + 1
    assert bits(fitted.train()[4].weight) == bits(fitted.eval()[4].weight)  # type: ignore[index]


def test_resume_goes_on_bit_for_bit() -> None:
    check_resumes(LrNet(), 2)


@pytest.mark.parametrize("width", [1, 2])
def test_common(width: int) -> None:
    check_common(LrNet(), width)


def test_more_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="lr-net can do 1, 2"):
        Quantize(weights=LrNet(), bits=4)


@pytest.mark.parametrize("method", [LrNet(), TernaryBernoulli(backward="power-of-two")])
def test_the_range_of_an_input_follows_each_batch_once(method: WeightQuantizer) -> None:
    result = quantized(trained(), method, 2, epochs=1, activations=QATInput(), activation_bits=8)
    batches = len(list(digits().data("train")))
    assert {int(q.state["batches"]) for q in quantized_inputs(result).values()} == {batches}


def test_outputs_that_are_scaled_afterwards_are_refused() -> None:
    with pytest.raises(UsageError, match="without the scale that xnor-input gives them; take binary-input"):
        Quantize(weights=LrNet(), bits=2, activations=XNORInput())
    context, net = Context(task=digits()), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = Plan((QuantizeInput.of("1", XNORInput(), 1, signed=True),)).apply(net)
    Quantize(weights=LrNet(), bits=2, ends="same").transform(model, context)
    assert "xnor-input" in context.record.skipped[0]["reason"]
