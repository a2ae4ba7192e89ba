"""What goes together in a weight that is seen as ``(groups, outputs, inputs, *kernel)``.

Outputs and inputs are those of one group of the convolution: the groups of a convolution share neither, so a set of
weights never reaches across them. Linear layers are one group; transposed convolutions are turned round.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.core.parametrize import Slot
from espalier.prune.masks import as_stored, outputs_first

Groups = Literal["weights", "filters", "channels", "shapes"]
"""What goes together: single weights; outputs; inputs; positions ``(input, *kernel)`` across the outputs."""


def group_dims(ndim: int, groups: Groups) -> tuple[int, ...]:
    """The dimensions inside one set, of a weight seen as ``(groups, outputs, inputs, *kernel)``: ``ndim`` in all."""
    kernel = tuple(range(3, ndim))
    return {"weights": (), "filters": (2, *kernel), "channels": (1, *kernel), "shapes": (1,)}[groups]


def best(score: Tensor) -> Tensor:
    """Mask (bool, the score's shape) of the one highest score."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.view(-1)[score.argmax()] = True
    return mask


def convolution(slot: Slot) -> bool:
    """Whether the slot is the weight of a convolution, transposed or not."""
    return isinstance(slot.module, _ConvNd) and slot.owners[0][2] == "weight"


def looked_up(slot: Slot) -> bool:
    """Whether rows of the weight are looked up by some owner: they are words then, and no units of a layer."""
    return any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module, _ in slot.owners)


def grouped(slot: Slot, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as ``(groups, outputs, inputs, *kernel)``."""
    first = outputs_first(slot, tensor)
    count = int(slot.module.groups) if convolution(slot) else 1  # type: ignore[arg-type]
    return first.reshape(count, len(first) // count, *first.shape[1:])


def ungrouped(slot: Slot, tensor: Tensor) -> Tensor:
    """Inverse of :func:`grouped`."""
    return as_stored(slot, tensor.flatten(0, 1))


def refusal(slot: Slot, groups: Groups) -> str | None:
    """Why these sets make no sense in this weight; None where they do."""
    if groups == "weights":
        return None
    if looked_up(slot):
        return "its rows are looked up (words), they are no units of a layer"
    if groups == "channels" and grouped(slot, slot.value()).shape[2] == 1:
        where = "each group of the convolution" if convolution(slot) and slot.module.groups != 1 else "the layer"
        return f"{where} reads one input: without it there is nothing left"
    return None
