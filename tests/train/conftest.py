"""Small real training problems, an epoch store in memory, and a task over them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from espalier.core.context import Context
from espalier.core.task import Task, classification


class MemoryStore:
    """What ``runs/`` does on disk: tensors copied, data through strict JSON; dies after ``die_after`` epochs."""

    def __init__(self) -> None:
        self.kept: tuple[int, dict[str, Tensor], str] | None = None
        self.die_after: int | None = None
        self.saves = 0

    def save(self, epoch: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
        self.kept = (epoch, {k: v.clone() for k, v in tensors.items()}, json.dumps(data, allow_nan=False))
        self.saves += 1
        if self.die_after == epoch:
            self.die_after = None
            raise KeyboardInterrupt

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        if self.kept is None:
            return None
        return self.kept[0], {k: v.clone() for k, v in self.kept[1].items()}, json.loads(self.kept[2])


@dataclass
class StoredContext(Context):
    """A context whose epochs are kept in memory, per name."""

    stores: dict[str, MemoryStore] = field(default_factory=dict)

    def epochs(self, name: str = "fit") -> MemoryStore:
        return self.stores.setdefault(name, MemoryStore())


def blobs(n: int = 96, seed: int = 0) -> TensorDataset:
    """Three noisy classes of 1 x 6 x 6 images."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 6, 6, generator=generator)
    x[torch.arange(n), 0, y * 2] += 1.0
    return TensorDataset(x, y)


def image_task(**changes: Any) -> Task:
    """Shuffled training batches drawn with the global generator."""
    train, val = DataLoader(blobs(), batch_size=16, shuffle=True), DataLoader(blobs(48, 1), batch_size=48)
    return dataclasses.replace(classification(train, val), **changes)


def small_net(*, dropout: float = 0.0, norm: bool = False) -> nn.Module:
    """Convolution, optional batch norm, dropout and a classifier."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 3),
    )


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
