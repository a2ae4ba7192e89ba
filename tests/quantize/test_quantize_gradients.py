"""Quantized gradients and errors: right on average, few values, each sample on its own scale, and networks learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.quantize import GradientQuantizer, Quantize
from espalier.quantize.dorefa_gradient import dorefa_gradient
from espalier.quantize.error_quantization import ErrorQuantization
from espalier.quantize.gradient_quantization import GradientQuantization
from espalier.quantize.gradients import Gradients
from espalier.quantize.sign_gradient import sign_gradient
from espalier.quantize.terngrad import terngrad
from espalier.quantize.wage import wage_error, wage_gradient
from espalier.train import fit

VALUES = torch.tensor([0.7, -0.31, 0.02, 0.0, -1.3, 0.9])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )


STOCHASTIC = {
    **{f"dorefa-{b}": lambda g, b=b: dorefa_gradient(g, b, seeded(), samples=True) for b in (1, 2, 4, 8)},
    "terngrad": lambda g: terngrad(g, seeded(), samples=True, clip=None),
    **{f"wage-{b}": lambda g, b=b: wage_gradient(g, b, seeded(), samples=True) for b in (2, 3, 4, 8)},
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_mean_is_right(name):
    found = STOCHASTIC[name](VALUES.expand(20_000, 6))
    error = found.double().std(0) / len(found) ** 0.5
    assert ((found.double().mean(0) - VALUES).abs() <= 5 * error + 1e-6).all()
    assert found.std(0).max() > 0  # it is by chance that it is right


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_so_many_values(bits):
    gradient = torch.rand(200, 200, generator=seeded(1)) * 2 - 1
    levels = dorefa_gradient(gradient, bits, seeded(), samples=False).unique()
    assert len(levels) == 2**bits
    assert torch.allclose(levels, torch.linspace(-1, 1, 2**bits) * gradient.abs().max())
    if bits > 1:
        for found in (
            wage_gradient(gradient, bits, seeded(), samples=False), wage_error(gradient, bits, samples=False)
        ):  # fmt: skip
            assert 3 <= len(found.unique()) <= 2**bits - 1
            codes = found / found.abs()[found != 0].min()
            assert torch.equal(codes, codes.round())
    size = gradient.abs().mean()
    assert torch.allclose(sign_gradient(gradient, samples=False), gradient.sign() * size)
    assert sign_gradient(gradient, samples=False, scaled=False).unique().tolist() == [-1, 1]


def test_terngrad_clips_at_its_deviations():
    gradient = torch.randn(1000, generator=seeded(2))
    gradient[0] = 1000
    bound = 2.5 * float(gradient.std(correction=0))
    found = terngrad(gradient, seeded(), samples=False).unique()
    assert found.tolist() == pytest.approx([0, bound]) or found.tolist() == pytest.approx([-bound, 0, bound])
    free = terngrad(gradient, seeded(), samples=False, clip=None)
    assert free[0] == 1000
    constant = torch.full((10,), 3.0)  # nothing deviates, nothing is clipped
    assert torch.equal(terngrad(constant, seeded(), samples=False), constant)


def test_wage_errors_by_hand():
    error = torch.tensor([[0.9, -0.2, 0.03, -1.4], [0.0, 0.0, 0.0, 0.0], [7.0, 0.5, -3.0, 0.25]])
    found = wage_error(error, 3, samples=True)
    for row, got in zip(error.numpy().astype(float), found.numpy(), strict=True):
        largest = np.abs(row).max()
        scale = 2.0 ** np.round(np.log2(largest)) if largest else 1.0
        wanted = scale * np.clip(0.25 * np.round(row / scale / 0.25), -0.75, 0.75)
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("form", ["dorefa", "terngrad", "sign", "wage"])
def test_every_sample_has_its_own_scale(form):
    part = ErrorQuantization(form=form)
    bits = max(part.widths[0], 2 if form == "wage" else 1)
    errors = torch.randn(6, 5, 4, generator=seeded(3))
    loud = errors.clone()
    loud[0] *= 1024
    alone, beside = (part.quantize(e, bits, seeded(), samples=True) for e in (errors, loud))
    assert torch.equal(alone[1:], beside[1:])
    assert torch.equal(alone[0] * 1024, beside[0])
    together = part.quantize(loud, bits, seeded(), samples=False)
    assert not torch.equal(together[1:], alone[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zeros_types_and_seeds(bits, dtype):
    for part in (GradientQuantization(), ErrorQuantization(), ErrorQuantization(form="dorefa")):
        nothing = torch.zeros(3, 4, dtype=dtype)
        assert torch.equal(part.quantize(nothing, bits, seeded(), samples=True), nothing)
        gradient = torch.randn(3, 4, generator=seeded(4)).to(dtype)
        one, two = (part.quantize(gradient, bits, seeded(5), samples=True) for _ in range(2))
        assert torch.equal(one, two)
        assert one.dtype == dtype
        assert one.shape == gradient.shape


def test_the_form_fits_the_bits():
    assert [GradientQuantization().chosen(bits) for bits in (1, 2, 3, 16)] == ["sign", "terngrad", "dorefa", "dorefa"]
    assert [ErrorQuantization().chosen(bits) for bits in (1, 2, 3)] == ["dorefa", "terngrad", "dorefa"]
    with pytest.raises(UsageError, match=r"gradient_bits=8: gradient-quantization can do 2"):
        Quantize(gradients=GradientQuantization(form="terngrad"), gradient_bits=8, epochs=1)
    with pytest.raises(UsageError, match=r"error_bits=1: error-quantization can do 2, 3"):
        Quantize(errors=ErrorQuantization(form="wage"), error_bits=1, epochs=1)


class Spy(GradientQuantizer):
    """Notes what it is given, samples first, and hands it back."""

    id = "spy"

    def __post_init__(self):
        object.__setattr__(self, "seen", [])

    def quantize(self, gradient, bits, generator, *, samples):
        self.seen.append((gradient.clone(), samples))
        return gradient


def backward(module: nn.Module, call: Any) -> list[tuple[Tensor, bool]]:
    spy = Spy()
    with Gradients(Quantize(errors=spy, epochs=1), module):
        call(module)
    return spy.seen


def test_samples_are_found_in_every_layer():
    def total(output):
        return (output * torch.arange(output.numel()).reshape(output.shape)).sum().backward()

    steps_first = backward(nn.LSTM(3, 4), lambda m: total(m(torch.randn(5, 2, 3))[0]))
    assert [(tuple(g.shape), s) for g, s in steps_first] == [((2, 5, 4), True)]
    batch_first = backward(nn.GRU(3, 4, batch_first=True), lambda m: total(m(torch.randn(2, 5, 3))[0]))
    assert [(tuple(g.shape), s) for g, s in batch_first] == [((2, 5, 4), True)]
    one = backward(nn.Linear(3, 4), lambda m: total(m(torch.randn(3))))
    assert [(tuple(g.shape), s) for g, s in one] == [((4,), False)]
    image = backward(nn.Conv2d(1, 2, 3), lambda m: total(m(torch.randn(1, 5, 5))))
    assert [s for _, s in image] == [False]


def test_packed_sequences_are_taken_sample_by_sample():
    lengths = [2, 4, 1]
    padded = torch.randn(3, 4, 3)
    packed = nn.utils.rnn.pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    weights = torch.randn(7, 5)
    module = nn.RNN(3, 5)
    plain = nn.RNN(3, 5)
    plain.load_state_dict(module.state_dict())
    seen = backward(module, lambda m: (m(packed)[0].data * weights).sum().backward())
    ((gradient, samples),) = seen
    assert samples
    assert gradient.shape == (3, 4, 5)
    assert gradient.abs().sum((0, 2)).count_nonzero() == 4
    assert gradient.abs().sum(2).count_nonzero(1).tolist() == [4, 2, 1]  # longest first, as they are packed
    (plain(packed)[0].data * weights).sum().backward()
    assert torch.equal(module.weight_ih_l0.grad, plain.weight_ih_l0.grad)


class Watching(Callback):
    """The numbers of distinct values in the gradients that the optimizer gets."""

    def __init__(self):
        self.distinct: set[int] = set()
        self.biases: set[int] = set()

    def before_step(self, loop):
        for slot in slots(loop.model).values():
            count = len(slot.latent.grad.unique())
            (self.distinct if slot.latent.ndim >= 2 else self.biases).add(count)


def test_the_optimizer_gets_so_many_values(task):
    model, watch = network(), Watching()
    method = Quantize(gradients=GradientQuantization(), gradient_bits=3, epochs=1)
    fit(model, Context(task=task), epochs=1, callbacks=(Gradients(method, model), watch))
    assert max(watch.distinct) == 8
    assert max(watch.biases) > 8


@pytest.mark.parametrize(
    ("gradient", "error", "form", "least"),
    [(8, 8, "auto", 84), (4, 4, "auto", 82), (4, 4, "wage", 80), (2, 2, "auto", 72), (1, 8, "auto", 80)],
)
def test_networks_learn(gradient, error, form, least, task):
    step = Quantize(
        epochs=4, lr=3e-3, gradients=GradientQuantization(form=form), errors=ErrorQuantization(form=form),
        gradient_bits=gradient, error_bits=error,
    )  # fmt: skip
    context = Context(task=task)
    assert context.measure(step(network(), context)).value > least
