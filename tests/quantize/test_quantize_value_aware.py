"""Value-aware quantization: which values stay exact, the grid of the others, and how both are stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.quantize.incremental_digits import (
    accuracy,
    answers,
    check_common,
    check_resumes,
    digits,
    quantized,
    trained,
)
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import NumericError, UsageError
from espalier.core.inputs import Input, Observed, quantized_inputs
from espalier.core.parametrize import freeze, slots
from espalier.core.quantized import State
from espalier.core.registry import register
from espalier.core.representation import Affine, Dense, Outliers
from espalier.graph import trace
from espalier.quantize.quantize import Quantize, put
from espalier.quantize.value_aware import ValueAware, ValueAwareInput, large_ones
from espalier.testing.compare import bits, frozen_copy


def test_the_large_ones_by_hand() -> None:
    weight = torch.tensor([[0.1, -5.0, 2.0], [4.0, -4.0, 9.0]])
    kept = torch.tensor([[True] * 3, [True, True, False]])
    assert large_ones(weight, 0.4).tolist() == [[False, True, False], [False, False, True]]
    assert large_ones(weight, 0.4, kept).tolist() == [[False, True, False], [True, False, False]]
    assert int(large_ones(torch.randn(1000), 0.03).sum()) == 30
    assert not large_ones(weight, 0.0).any()


@pytest.mark.parametrize("width", [2, 4, 9])
def test_weights_against_numpy(width: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    with torch.no_grad():
        layer.weight[3, 4], layer.weight[5, 6] = 7.123456, -3.3
    weight = layer.weight.detach().numpy().astype(np.float64)
    put(slots(layer)["weight"], ValueAware(ratio=0.01), width)
    stored = freeze(layer)[0]["weight"]
    assert isinstance(stored, Outliers)
    assert isinstance(stored.inner, Affine)
    assert isinstance(stored.exact, Dense)
    assert stored.exact.stored == "float16"
    order = np.argsort(-np.abs(weight).reshape(-1))
    large = np.zeros(600, dtype=bool)
    large[order[:6]] = True
    assert np.array_equal(stored.mask.reshape(-1), large)
    found = stored.dense().astype(np.float64)
    assert np.array_equal(found[stored.mask], weight.astype(np.float16).astype(np.float64)[stored.mask])
    limit = np.abs(weight[~stored.mask]).max()
    step = limit / (2 ** (width - 1) - 1)
    assert np.abs(found - weight)[~stored.mask].max() <= step / 2 * 1.0001
    assert np.abs(np.unique(np.round(found[~stored.mask] / step))).max() <= 2 ** (width - 1) - 1
    assert bits(torch.from_numpy(stored.dense())) == bits(layer.eval().weight.detach())


def test_few_large_weights_help() -> None:
    exact, plain = (quantized(trained(), ValueAware(ratio=ratio), 3) for ratio in (0.03, 0.0))
    reference = trained()
    errors = [
        sum(float((a - b).square().sum()) for a, b in zip(answers(model), answers(reference), strict=True))
        for model in (exact, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


def inputs(method: ValueAwareInput, sample: torch.Tensor, width: int, *, signed: bool) -> Input:
    extremes = torch.stack(sample.aminmax())[None]
    return Input(width, signed, State(method.start(Observed(sample, extremes), width, signed=signed)), training=False)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_by_hand(signed: bool) -> None:
    sample = torch.cat([torch.linspace(0, 7, 99), torch.tensor([100.0])])
    a = inputs(ValueAwareInput(ratio=0.01), sample, 3 if not signed else 4, signed=signed)
    x = torch.tensor([0.4, 0.6, 6.9, 7.0, 7.2, 100.0, *([-2.4, -7.0, -9.3] if signed else [])])
    expected = [0.0, 1.0, 7.0, 7.0, 7.2, 100.0, *([-2.0, -7.0, -9.3] if signed else [])]
    assert ValueAwareInput().quantize(x, a).tolist() == pytest.approx(expected)


def test_inputs_that_are_nearly_all_zero_keep_a_grid() -> None:
    sample = torch.zeros(1000)
    sample[0] = 3.0
    a = inputs(ValueAwareInput(), sample, 4, signed=False)
    assert ValueAwareInput().quantize(torch.tensor([0.0, 3.0, 1.75]), a).tolist() == pytest.approx([0, 3, 1.8])


def test_gradients_pass_where_values_are_on_the_grid_or_exact() -> None:
    a = inputs(ValueAwareInput(ratio=0.1), torch.linspace(-1, 1, 100), 4, signed=True)
    x = torch.tensor([0.3, -0.7, 5.0, -6.0], requires_grad=True)
    ValueAwareInput().quantize(x, a).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 1]


def test_weights_and_inputs_train_together_and_are_traced() -> None:
    register("quantize", (ValueAware, ValueAwareInput))
    step = Quantize(
        weights=ValueAware(ratio=0.02), activations=ValueAwareInput(), bits=3, activation_bits=3, ends="same", epochs=4,
        batches=2,
    )  # fmt: skip
    model = step.transform(trained(), Context(task=digits()))
    assert accuracy(model) > 0.9
    assert set(quantized_inputs(model)) == {"0", "4", "9"}
    assert bits(answers(model)) == bits(answers(frozen_copy(model)))
    x = next(iter(digits().data("val")))[0]
    assert trace(model.eval(), (x,)) is not None


def test_common() -> None:
    check_common(ValueAware(ratio=0.05), 3)


def test_resume_goes_on_bit_for_bit() -> None:
    check_resumes(ValueAware(), 4)


def test_what_cannot_be_is_refused() -> None:
    layer = nn.Linear(20, 20)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with pytest.raises(NumericError, match="does not fit into 16 bits"):
        put(slots(layer)["weight"], ValueAware(), 4)
    with pytest.raises(UsageError, match="value-aware can do"):
        Quantize(weights=ValueAware(), bits=1)
