"""Augmentations: random changes of the training images, vectorised over the batch.

They draw from torch's global generator on the images' device; the loop seeds it for every epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.core.errors import UsageError
from espalier.core.method import Method

Fill = Literal["zero", "edge"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Method):
    """A random change of images ``(n, channels, height, width)`` that keeps shape, dtype and label."""

    kind: ClassVar[str] = "augmentation"

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """New images; the argument is not written to."""


def random_window(images: Tensor, reach: int, fill: Fill) -> Tensor:
    """Each image moved by its own uniform offset of at most ``reach`` pixels per axis; what enters is ``fill``."""
    n, channels, height, width = images.shape
    down, right = torch.randint(2 * reach + 1, (2, n, 1), device=images.device)
    padded = F.pad(images, [reach] * 4, mode="constant" if fill == "zero" else "replicate")
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    places = rows.unsqueeze(2) * (width + 2 * reach) + columns.unsqueeze(1)
    chosen = places.reshape(n, 1, -1).expand(n, channels, -1)
    return padded.flatten(2).gather(2, chosen).reshape(images.shape)


def augmented(batch: Any, augment: tuple[Augmentation, ...]) -> Any:
    """``batch`` with its first image tensor changed. Raises ``UsageError`` where it holds none."""
    changed, found = _change_first(batch, augment)
    if not found:
        raise UsageError(
            "augmentation needs images of shape (n, channels, height, width) and a floating-point dtype in the batch; "
            f"got {_describe(batch)}. Flatten inside the model, or leave augment out."
        )
    return changed


def _change_first(value: Any, augment: tuple[Augmentation, ...]) -> tuple[Any, bool]:
    if isinstance(value, Tensor):
        if value.ndim != 4 or not value.is_floating_point():
            return value, False
        for change in augment:
            value = change(value)
        return value, True
    if isinstance(value, Mapping):
        items = dict(value)
        for key, item in items.items():
            items[key], found = _change_first(item, augment)
            if found:
                return items, True
    elif isinstance(value, (tuple, list)):
        listed = list(value)
        for place, item in enumerate(listed):
            listed[place], found = _change_first(item, augment)
            if found:
                return (type(value)(*listed) if hasattr(value, "_fields") else type(value)(listed)), True
    return value, False


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return type(value).__name__
