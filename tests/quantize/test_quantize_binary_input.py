"""Binary activations: values, the hard tanh's gradient, digits, the graph."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.binary_nets import accuracy, run, traces, without_relu

from espalier.core.errors import UsageError
from espalier.core.inputs import quantized_inputs
from espalier.quantize import Quantize
from espalier.quantize.binary import Binary
from espalier.quantize.binary_input import BinaryInput, binary_input


def test_values_and_gradient() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 1.01], requires_grad=True)
    found = binary_input(x)
    assert found.tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    found.backward(torch.arange(1.0, 8.0))
    slope = torch.autograd.functional.jacobian(torch.nn.functional.hardtanh, torch.tensor([-2.0, -0.3, 0.5, 1.01]))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]
    assert slope.diagonal().tolist() == [0.0, 1.0, 1.0, 0.0]  # the same rule away from the corners


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert binary_input(torch.randn(4).to(dtype)).dtype == dtype


def test_digits_and_the_graph() -> None:
    result = run(without_relu(), weights=Binary(), activations=BinaryInput(), epochs=3, lr=3e-3)
    assert accuracy(result) > 90
    assert [q.method.id for q in quantized_inputs(result).values()].count("binary-input") == 2  # all but the ends
    traces(result)


def test_more_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="binary-input can do 1"):
        Quantize(activations=BinaryInput(), activation_bits=2)
