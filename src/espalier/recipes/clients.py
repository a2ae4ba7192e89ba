"""The training data divided among the clients of a federation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from espalier.core.errors import DataError
from espalier.core.task import Task

Split = Literal["iid", "shards", "dirichlet"]


@dataclass(frozen=True)
class Samples:
    """All samples of a data set: tensors with one row for each, the structure of a batch, and the batch size."""

    tensors: tuple[Tensor, ...]
    structure: Any
    batch_size: int

    @classmethod
    def of(cls, task: Task) -> Samples:
        """Read the training data once. Raises ``DataError`` for batches that cannot be cut into samples."""
        columns: list[list[Tensor]] = []
        structure, batch_size = None, 0
        for batch in task.data("train"):
            leaves, found = _pytree.tree_flatten(batch)
            lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else -1 for leaf in leaves}
            if len(lengths) != 1 or -1 in lengths or (structure is not None and found != structure):
                raise DataError(
                    "a federation divides the training data by samples, so every batch must hold tensors with one row "
                    "for each sample, nested alike. Give Task(train=...) such batches."
                )
            structure, batch_size = found, batch_size or lengths.pop()
            columns = columns or [[] for _ in leaves]
            for column, leaf in zip(columns, leaves, strict=True):
                column.append(leaf)
        if not columns:
            raise DataError("the training data holds no batch; a federation needs samples to divide.")
        return cls(tuple(torch.cat(column) for column in columns), structure, batch_size)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, rows: Tensor) -> Any:
        """The samples of ``rows`` as one batch."""
        return _pytree.tree_unflatten([tensor[rows] for tensor in self.tensors], self.structure)

    def labels(self, task: Task) -> Tensor:
        """The class of every sample. Raises ``DataError`` where the labels are no class indices."""
        label = task.target(self.batch(torch.arange(len(self))))
        if not isinstance(label, Tensor) or label.is_floating_point() or label.ndim != 1:
            raise DataError("the samples have no class each to be divided by; give split=iid.")
        return label


@dataclass(frozen=True)
class Part:
    """The samples of one client, in batches, in a new order of torch's global generator at every iteration."""

    samples: Samples
    rows: Tensor

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.samples.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = self.rows[torch.randperm(len(self.rows))]
        return (self.samples.batch(rows) for rows in torch.split(order, self.samples.batch_size))


def divide(
    labels: Tensor | None, count: int, clients: int, split: Split, *, shards: int, alpha: float,
    generator: torch.Generator,
) -> list[Tensor]:  # fmt: skip
    """The rows of each client; every row is one client's.

    ``iid``: at random. ``shards``: sorted by label, cut into ``clients * shards`` runs, of which each client gets
    ``shards``. ``dirichlet``: of each class the clients get shares drawn from a Dirichlet distribution of ``alpha``.
    """
    shuffled = torch.randperm(count, generator=generator)
    if split == "iid" or labels is None:
        return list(shuffled.tensor_split(clients))
    if split == "shards":
        ordered = shuffled[labels[shuffled].argsort(stable=True)]
        runs = ordered.tensor_split(clients * shards)
        dealt = torch.randperm(len(runs), generator=generator).reshape(clients, shards)
        return [torch.cat([runs[n] for n in own]) for own in dealt.tolist()]
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in sorted(set(labels.tolist())):
        rows = shuffled[labels[shuffled] == label]
        shares = torch._standard_gamma(torch.full((clients,), alpha, dtype=torch.float64), generator=generator)
        shares = shares / shares.sum() if bool(shares.sum() > 0) else torch.full_like(shares, 1 / clients)
        ends = (shares.cumsum(0) * len(rows)).round().long()[:-1]
        for own, rows_of_class in zip(parts, rows.tensor_split(ends), strict=True):
            own.append(rows_of_class)
    return [torch.cat(own) for own in parts]
