"""Labelled images in memory, and how their bytes become the numbers a network sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.core.errors import DataError, UsageError

Size = int | float


@dataclass(frozen=True)
class Normalisation:
    """``(x / 255 - mean) / std`` per channel; ``mean`` and ``std`` on the scale 0..1. Raises ``UsageError``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or any(s <= 0 for s in self.std):
            raise UsageError(
                f"mean and std need one number per channel, and std must be positive; got mean {self.mean} and "
                f"std {self.std}."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` to float32 of the same shape. Raises ``DataError`` for another type or C."""
        channels = len(self.mean)
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != channels:
            raise DataError(
                f"a normalisation of {channels} channel(s) takes uint8 images (N, {channels}, H, W); "
                f"got {images.dtype} {tuple(images.shape)}."
            )
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        return images.to(torch.float32).sub_(mean * 255).div_(std * 255)


@dataclass(frozen=True, eq=False)
class Images:
    """``images`` uint8 (N, C, H, W), ``labels`` int64 (N,) in 0..len(classes)-1. Raises ``DataError`` otherwise."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.numel() == 0:
            raise DataError(
                f"images must be a non-empty uint8 tensor (N, C, H, W); got {self.images.dtype} "
                f"{tuple(self.images.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 ({len(self.images)},), one per image; got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(f"labels must lie in 0..{len(self.classes) - 1}, one per class; got {low}..{high}.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, index: Tensor) -> Images:
        """The images at ``index`` (int64, in that order)."""
        return Images(self.images.index_select(0, index), self.labels.index_select(0, index), self.classes)

    def split(self, *sizes: Size, seed: int) -> tuple[Images, ...]:
        """Disjoint parts of a seeded shuffle, in order: counts, fractions of N, and one ``-1`` for the rest.

        Raises ``UsageError`` where the sizes do not fit.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        counts = split_counts(len(self), sizes)
        return tuple(self.take(part) for part in torch.split(order[: sum(counts)], counts))

    def normalisation(self) -> Normalisation:
        """Mean and standard deviation per channel of these images, exact from the 256-bin histograms."""
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in range(self.images.shape[1]):
            share = torch.bincount(self.images[:, channel].flatten().to(torch.int64), minlength=256).double()
            share /= share.sum()
            centre = float((share * values).sum())
            mean.append(centre)
            std.append(float((share * (values - centre).square()).sum().sqrt()))
        return Normalisation(tuple(mean), tuple(std))

    def float(self, normalisation: Normalisation | None = None) -> Tensor:
        """All images as float32 (N, C, H, W): normalised, or on the scale 0..1 without a normalisation."""
        return to_float(self.images, normalisation)


def to_float(images: Tensor, normalisation: Normalisation | None) -> Tensor:
    """uint8 to float32: normalised, or divided by 255 where there is no normalisation."""
    return images.to(torch.float32).div_(255) if normalisation is None else normalisation(images)


def split_counts(total: int, sizes: tuple[Size, ...]) -> list[int]:
    """The length of each part of ``total`` items.

    ``sizes``: counts (int), fractions in 0..1 (float, rounded down) and at most one ``-1``, the rest. Raises
    ``UsageError``.
    """
    rest = [i for i, size in enumerate(sizes) if size == -1]
    fractions_fit = all(0 < size <= 1 for size in sizes if isinstance(size, float))
    counts = [int(size * total) if isinstance(size, float) else size for size in sizes] if fractions_fit else [0]
    if not sizes or len(rest) > 1 or any(count < 1 for i, count in enumerate(counts) if i not in rest):
        raise UsageError(
            f"a split of {total} images takes counts of at least 1 or fractions that give as many, and at most one "
            f"-1 (the rest); got {sizes}."
        )
    asked = sum(count for i, count in enumerate(counts) if i not in rest)
    if asked + len(rest) > total:
        raise UsageError(f"the split {sizes} needs at least {asked + len(rest)} images; there are {total}.")
    return [total - asked if i in rest else count for i, count in enumerate(counts)]
