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
from torch.utils import _pytree

from espalier.core.errors import UsageError
from espalier.core.method import Method
from espalier.core.task import Task

Fill = Literal["zero", "edge"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Method):
    """A random change of images ``(n, channels, height, width)`` that keeps shape, dtype and label."""

    kind: ClassVar[str] = "augmentation"

    def check(self, task: Task) -> None:
        """Raise ``UsageError`` where the task's loss or labels do not go with it."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """New images; the argument is not written to."""


@dataclass(frozen=True, kw_only=True)
class Geometric(Augmentation):
    """Moves pixels, and so goes with labels of whole images alone."""

    def check(self, task: Task) -> None:
        """No label may have a place in the image, unless it is made of the image itself and moves with it."""
        batch = task.example()
        flat, spec = _pytree.tree_flatten(batch)
        place = next((n for n, leaf in enumerate(flat) if _is_images(leaf)), None)
        if place is None:
            return
        images = flat[place]
        blank = _pytree.tree_unflatten([*flat[:place], torch.zeros_like(images), *flat[place + 1 :]], spec)
        for leaf, other in zip(*(_pytree.tree_leaves(task.target(b)) for b in (batch, blank)), strict=False):
            dense = isinstance(leaf, Tensor) and leaf.ndim >= 3 and leaf.shape[-2:] == images.shape[-2:]
            if dense and torch.equal(leaf, other):
                raise UsageError(
                    f"{self.name} moves the pixels of the images {tuple(images.shape)}, and their labels "
                    f"{_describe(leaf)}, which have a place for each pixel, would stay where they are. Move both where "
                    f"the batches are made, and leave {self.id} out of augment."
                )


@dataclass(frozen=True, kw_only=True)
class Mixing(Augmentation):
    """Blends every image with another one of the batch, and so belongs to two labels."""

    @abstractmethod
    def draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Whom each image is blended with ``(n,)``, and the share ``()`` it keeps of itself."""

    def __call__(self, images: Tensor) -> Tensor:
        """The blends, without what their labels need."""
        return blend(images, *self.draw(images))


def blend(images: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """``share x_i + (1 - share) x_partner(i)``."""
    return images.lerp(images[partner], (1 - share).to(images.dtype))


@dataclass(frozen=True)
class Augmented:
    """A changed batch. Where images were blended, ``other`` is it with the partners' labels, else None.

    The loss is then ``share`` of that on ``batch`` and the rest of that on ``other``.
    """

    batch: Any
    other: Any = None
    share: Tensor | float = 1.0


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


def augmented(batch: Any, augment: tuple[Augmentation, ...]) -> Augmented:
    """``batch`` with its first image tensor changed. Raises ``UsageError`` where it holds none."""
    flat, spec = _pytree.tree_flatten(batch)
    place = next((n for n, leaf in enumerate(flat) if _is_images(leaf)), None)
    if place is None:
        raise UsageError(
            "augmentation needs images of shape (n, channels, height, width) and a floating-point dtype in the batch; "
            f"got {_describe(batch)}. Flatten inside the model, or leave augment out."
        )
    images, partners = flat[place], None
    share: Tensor | float = 1.0
    for change in augment:
        if isinstance(change, Mixing):
            partner, share = change.draw(images)
            partners = [leaf[partner] if _counted(leaf, len(images)) else leaf for leaf in flat]
            images = blend(images, partner, share)
        else:
            images = change(images)

    def put(leaves: list[Any]) -> Any:
        return _pytree.tree_unflatten([*leaves[:place], images, *leaves[place + 1 :]], spec)

    return Augmented(put(flat), None if partners is None else put(partners), share)


def _counted(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (n,)


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return type(value).__name__
