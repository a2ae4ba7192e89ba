"""Batches of tensors that are already in memory: no workers, one gather per batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from espalier.core.errors import DataError, UsageError
from espalier.data.images import Images, Normalisation, to_float


class Loader:
    """Re-iterable batches ``(x, y)``; uint8 ``x`` leaves as float32, other types as they are.

    ``x`` (N, ...), ``y`` (N, ...). ``shuffle`` draws a new order from torch's global generator at every
    iteration, so seeding torch repeats an epoch. Without a normalisation uint8 is divided by 255. Raises
    ``DataError`` for data that cannot give one batch, ``UsageError`` for a batch size below 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        normalisation: Normalisation | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {batch_size}.")
        if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
            raise DataError(f"x and y need one row per sample each; got {tuple(x.shape)} and {tuple(y.shape)}.")
        if len(x) < (batch_size if drop_last else 1):
            raise DataError(
                f"a loader needs at least one batch; got {len(x)} samples for batch_size {batch_size}"
                f"{' with drop_last' if drop_last else ''}."
            )
        if normalisation is not None:
            normalisation(x[:1])  # a wrong type or channel count is named here, not in the middle of an epoch
        self.x, self.y = x, y
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.normalisation = normalisation

    @classmethod
    def of(
        cls, images: Images, *, batch_size: int, shuffle: bool = False, normalisation: Normalisation | None = None
    ) -> Loader:
        """A loader over labelled images."""
        return cls(images.images, images.labels, batch_size=batch_size, shuffle=shuffle, normalisation=normalisation)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def samples(self) -> int:
        """How many samples one iteration yields."""
        return len(self) * self.batch_size if self.drop_last else len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The order is drawn here, not at the first batch, so that an iterator made first is seeded first.
        return self._batches(torch.randperm(len(self.x)) if self.shuffle else None)

    def _batches(self, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.samples, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.samples))
            if order is None:
                x, y = self.x[rows], self.y[rows]
            else:
                picked = order[rows].to(self.x.device)
                x, y = self.x.index_select(0, picked), self.y.index_select(0, picked.to(self.y.device))
            yield (to_float(x, self.normalisation) if x.dtype == torch.uint8 else x), y
