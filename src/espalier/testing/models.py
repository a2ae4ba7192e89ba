"""Small models of every awkward kind, with data: what a technique must cope with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.metric import Accuracy
from espalier.core.task import Task

CLASSES, WORDS = 3, 11


class _Tied(nn.Module):
    """Embedding and output layer are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(torch.tanh(self.embed(tokens).mean(dim=1)))


class _Twice(nn.Module):
    """One layer under two names, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.again(torch.relu(self.block(x)))))


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.head(torch.relu(self.left(x) + self.right(z)))


class _Named(nn.Module):
    """Keyword arguments in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, *, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.body(x)) * scale
        return {"logits": self.head(hidden), "hidden": hidden}


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, CLASSES))


def _convolution() -> nn.Module:
    convolution = nn.Conv2d(1, 4, 3, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def _frozen() -> nn.Module:
    model = _mlp()
    model[0].requires_grad_(requires_grad=False)
    return model


def _halve(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _hooked() -> nn.Module:
    model = _mlp()
    model[0].register_forward_hook(_halve)
    return model


class _NamedAccuracy(Accuracy):
    def per_sample(self, output: Any, target: Any) -> Tensor:
        return super().per_sample(output["logits"], target)


def _named_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], target)


@dataclass(frozen=True)
class Example:
    """A small model and its data: ``batch(n)`` makes ``n`` labelled samples with torch's global generator."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, the same every time; gradients left over, its last module in another mode than the rest."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model()
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        list(model.modules())[-1].eval()
        return model

    def task(self) -> Task:
        """Three training batches, one to validate."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return Task(train=[self.batch(8) for _ in range(3)], val=[self.batch(8)], **self.options)


def _labels(n: int, classes: int = CLASSES) -> Tensor:
    return torch.arange(n) % classes


def _vectors(n: int) -> Any:
    return torch.randn(n, 6), _labels(n)


EXAMPLES: tuple[Example, ...] = (
    Example("mlp", _mlp, _vectors),
    Example("convolution", _convolution, lambda n: (torch.randn(n, 1, 6, 6), _labels(n))),
    Example("tied", _Tied, lambda n: (torch.randint(WORDS, (n, 5)), _labels(n, WORDS))),
    Example("twice", _Twice, _vectors),
    Example("frozen", _frozen, _vectors),
    Example("two-inputs", _TwoInputs, lambda n: (torch.randn(n, 6), torch.randn(n, 4), _labels(n))),
    Example(
        "named",
        _Named,
        lambda n: {"x": torch.randn(n, 6), "scale": torch.rand(n, 1), "labels": _labels(n)},
        {"loss": _named_loss, "metric": _NamedAccuracy()},
    ),
    Example("recurrent", _Recurrent, lambda n: (torch.randn(n, 5, 4), _labels(n))),
    Example("hooked", _hooked, _vectors),
    Example("attention", _Attention, lambda n: (torch.randn(n, 4, 8), _labels(n))),
)
"""What the contract is checked on unless a subclass names its own."""
