from __future__ import annotations

import pytest
import torch
from tests.graph.networks import Attention, LeNet5, LeNet300, Recurrent, ResNet, SqueezeNet
from torch import nn

from espalier.graph import macs, trace


@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (LeNet300, (1, 28, 28), 266_200),
        (LeNet5, (1, 28, 28), 2_293_000),
        (lambda: ResNet(3), (3, 32, 32), 40_551_040),
        pytest.param(SqueezeNet, (3, 224, 224), 818_924_576, marks=pytest.mark.slow),
    ],
    ids=["lenet300", "lenet5", "resnet20", "squeezenet"],
)
def test_known_networks(build, shape, expected):
    graph = trace(build(), (torch.randn(1, *shape),))
    counted = macs(graph)
    assert counted.total == expected == sum(counted.nodes)
    assert sum(counted.tensors.values()) == expected
    assert macs(graph, batch=3).total == 3 * expected


def test_per_tensor():
    counted = macs(trace(LeNet5(), (torch.randn(1, 1, 28, 28),)))
    assert counted.tensors == {
        "conv1.weight": 24 * 24 * 20 * 25,
        "conv2.weight": 8 * 8 * 50 * 20 * 25,
        "fc1.weight": 800 * 500,
        "fc2.weight": 5000,
    }


def test_grouped_and_transposed_convolution():
    grouped = nn.Conv2d(4, 8, 3, groups=2, bias=False)
    assert macs(trace(grouped, (torch.randn(2, 4, 6, 6),))).total == 16 * 8 * 2 * 9
    up = nn.ConvTranspose2d(4, 6, 3, 2)
    assert macs(trace(up, (torch.randn(2, 4, 5, 5),))).total == 25 * 4 * 6 * 9


def test_attention_counts_both_products():
    t, c = 5, 8
    projections = t * c * 3 * c + t * c * c
    expected = projections + 2 * t * t * c + c * 3
    assert macs(trace(Attention(), (torch.randn(2, t, c),))).total == expected


def test_recurrence_counts_every_step():
    lstm = 5 * (4 * 3) * 2 * ((4 + 3) + (6 + 3))
    gru, rnn = 5 * 9 * (6 + 3), 5 * 2 * (3 + 2)
    assert macs(trace(Recurrent(), (torch.randn(2, 5, 4),))).total == lstm + gru + rnn


def test_einsum_counts_the_product_of_its_labels():
    class Net(nn.Module):
        def forward(self, x):
            return torch.einsum("bik,bjk->bij", x, x) + torch.einsum("...k->...", x).sum()

    assert macs(trace(Net(), (torch.randn(2, 3, 7),))).total == 3 * 3 * 7
