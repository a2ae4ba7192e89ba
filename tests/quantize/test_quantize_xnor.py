"""XNOR-Net inputs: the scaled output by brute force for every kind of layer, digits, the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.binary_nets import accuracy, run, traces, without_relu
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import ModelError
from espalier.core.inputs import Input, Observed, QuantizedInput, put_quantizer
from espalier.core.quantized import State
from espalier.quantize.bwn import BWN
from espalier.quantize.xnor import XNORInput


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def quantized(layer: nn.Module) -> nn.Module:
    put_quantizer(layer, QuantizedInput(XNORInput(), 1, Observed.nothing(), signed=True))
    return layer.eval()


@pytest.mark.parametrize(
    "fields",
    [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"padding": "same"}, {"bias": False},
     {"padding": 1, "padding_mode": "reflect"}, {"groups": 2, "padding": 1}, {"groups": 4}],
)  # fmt: skip
def test_convolution_by_brute_force(fields: dict[str, Any]) -> None:
    """Unfolded: every output place scales by the mean magnitude under its window, padding counted as zero."""
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(4, 8, 3, **fields))
    x, groups = torch.randn(2, 4, 9, 7), layer.groups
    pad = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    window = {"kernel_size": 3, "dilation": layer.dilation, "stride": layer.stride}
    columns = F.unfold(F.pad(x.abs(), pad, mode=mode), **window)  # (batch, channels x 9, places)
    size = columns.reshape(2, groups, -1, columns.shape[-1]).mean(2)  # over a group's channels and places
    product = F.conv2d(
        F.pad(signs(x), pad, mode=mode), layer.weight, None, layer.stride, 0, layer.dilation, groups
    )  # fmt: skip
    wanted = product.flatten(2) * size.repeat_interleave(8 // groups, 1)
    if layer.bias is not None:
        wanted = wanted + layer.bias[:, None]
    assert torch.allclose(layer(x).flatten(2), wanted, atol=1e-5)


def test_linear_and_one_dimension_and_no_batch() -> None:
    torch.manual_seed(0)
    layer, x = quantized(nn.Linear(6, 3)), torch.randn(2, 5, 6)
    wanted = signs(x) @ layer.weight.T * x.abs().mean(-1, keepdim=True) + layer.bias
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    conv, y = quantized(nn.Conv1d(3, 4, 3, padding=1)), torch.randn(3, 8)
    size = F.avg_pool1d(F.pad(y.abs().mean(0, keepdim=True), (1, 1)), 3, 1)
    wanted = F.conv1d(signs(y), conv.weight, padding=1) * size + conv.bias[:, None]
    assert torch.allclose(conv(y), wanted, atol=1e-6)


def test_best_scale_of_two_sign_vectors() -> None:
    """With one window K a is the paper's <|x|><|w|>: what minimises the error in expectation (eq. 10)."""
    torch.manual_seed(0)
    layer, x = quantized(nn.Conv2d(3, 1, 4, bias=False)), torch.randn(1, 3, 4, 4)
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(weight.abs().mean() * signs(weight))
    assert float(layer(x).detach()) == pytest.approx(
        float(x.abs().mean() * weight.abs().mean() * (signs(x) * signs(weight)).sum()), rel=1e-5
    )  # fmt: skip


def test_gradient_through_the_sign_and_through_the_size() -> None:
    layer = quantized(nn.Linear(3, 1, bias=False))
    x = torch.tensor([[0.5, -2.0, 0.25]], requires_grad=True)
    layer(x).backward()
    weight, size = layer.weight.detach()[0], (0.5 + 2.0 + 0.25) / 3
    product = float(weight @ torch.tensor([1.0, -1.0, 1.0]))
    through_sign = weight * size * torch.tensor([1.0, 0.0, 1.0])
    through_size = product * torch.tensor([1.0, -1.0, 1.0]) / 3
    assert torch.allclose(x.grad[0], through_sign + through_size)


def test_digits_and_the_graph() -> None:
    result = run(without_relu(), weights=BWN(), activations=XNORInput(), epochs=3, lr=3e-3)
    assert accuracy(result) > 90
    traces(result, tolerance=1e-5)


def test_layers_without_a_geometry_are_refused() -> None:
    layer = nn.RNN(3, 4)
    with pytest.raises(ModelError, match="RNN is neither"):
        XNORInput().run(layer, layer.forward, torch.randn(2, 3), Input(1, True, State({}), False))
