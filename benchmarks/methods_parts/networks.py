"""The networks of ``benchmarks/methods.py``: one for each kind of structure that a method asks for.

All take (N, 1, 28, 28) and give logits (N, 10), and are small enough for one core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from examples.lenet import LeNet5, LeNet300
from torch import Tensor, nn


def normed() -> nn.Module:
    """LeNet-300-100 with a batch norm before each ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 100), nn.BatchNorm1d(100),
        nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def unit(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """A 3 x 3 convolution with its batch norm and ReLU."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def conv() -> nn.Module:
    """Three 3 x 3 convolutions with batch norms, 16, 32 and 32 channels, and two linear layers."""
    return nn.Sequential(
        *unit(1, 16), nn.MaxPool2d(2), *unit(16, 32), nn.MaxPool2d(2), *unit(32, 32), nn.AvgPool2d(2, padding=1),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def signed() -> nn.Module:
    """As ``conv``, with hard tanh in the place of ReLU, so that inputs of both signs reach every layer."""

    def part(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.Hardtanh()

    return nn.Sequential(
        *part(1, 16), *part(16, 32), *part(32, 64), nn.Flatten(), nn.Linear(576, 64), nn.BatchNorm1d(64), nn.Hardtanh(),
        nn.Linear(64, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*unit(width, width), *unit(width, width)[:2])
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W), as it came."""
        out: Tensor = self.act(x + self.body(x))
        return out


def residual(width: int = 24, blocks: int = 4) -> nn.Module:
    """A stem to 7 x 7 positions, residual blocks, a linear layer on the means."""
    return nn.Sequential(
        *unit(1, width, stride=2), nn.MaxPool2d(2), *(Block(width) for _ in range(blocks)), nn.AvgPool2d(7),
        nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    """Attention and an MLP, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width), as it came."""
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.between(x))
        return out


class Transformer(nn.Module):
    """4 x 4 patches of 7 x 7 pixels, two encoders of width 32 with four heads, a linear layer on the mean token."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> logits (N, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.encoders(tokens)).mean(1))
        return logits


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "plain": ("LeNet-300-100", LeNet300),
    "lenet5": ("LeNet-5", LeNet5),
    "normed": ("LeNet-300-100 with batch norms", normed),
    "conv": ("CNN 16-32-32-64 with batch norms", conv),
    "signed": ("CNN 16-32-64 with batch norms and hard tanh", signed),
    "residual": ("residual CNN, 4 blocks of 24 channels", residual),
    "transformer": ("transformer, 2 blocks, width 32, 4 heads", Transformer),
}
"""Short name -> what a row says it is, and how it is built."""
