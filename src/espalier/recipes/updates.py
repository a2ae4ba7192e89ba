"""What travels between clients and server: a change of the weights, sparse and in few bits, as the bytes of a file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.forms import dense_representation, dtype_name, from_numpy, to_numpy
from espalier.core.ranking import smallest
from espalier.core.representation import Affine, Codebook, Representation
from espalier.encode import encode, open_file

Tensors = dict[str, Tensor]


def learned(model: nn.Module) -> Tensors:
    """What training changes in ``model``, by name, as it is now: parameters that learn, and statistics."""
    found: Tensors = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found |= {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def install(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put ``values`` in the place of what training changes in ``model``."""
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)


def largest(update: Tensors, sparsity: float) -> Tensors:
    """Masks of the largest magnitudes of all tensors together: a share ``sparsity`` is left out, never all."""
    flat = torch.cat([value.float().abs().reshape(-1) for value in update.values()])
    kept = ~smallest(flat, min(math.floor(sparsity * len(flat) + 1e-9), len(flat) - 1))
    parts = torch.split(kept, [value.numel() for value in update.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(update.items(), parts, strict=True)}


def coded(value: Tensor, mask: Tensor, bits: int) -> Representation:
    """``value`` where ``mask``, else zero, in ``bits`` bits: a symmetric grid, or with one bit the sign times one
    magnitude, the mean of what is kept.
    """
    kept, name = torch.where(mask, value, torch.zeros_like(value)), dtype_name(value.dtype)
    if bits == 1:
        magnitude = float(kept.float().abs().sum() / mask.sum().clamp_min(1))
        return Codebook(
            shape=tuple(value.shape), dtype=name, indices=to_numpy(torch.sign(kept) + 1).astype(np.uint8),
            centroids=np.array([-magnitude, 0.0, magnitude], dtype=np.float32),
        )  # fmt: skip
    top = 2 ** (bits - 1) - 1
    scale = (kept.float().abs().max() / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = to_numpy(torch.round(kept.float() / scale).clamp(-top, top))
    return Affine(
        shape=tuple(value.shape), dtype=name, codes=codes.astype(np.int8 if bits <= 8 else np.int16),
        scale=to_numpy(scale), zero_point=np.zeros((), dtype=np.int32), bits_per_code=bits,
    )  # fmt: skip


def packed(update: Tensors, sparsity: float, bits: int | None, whole: Collection[str] = ()) -> bytes:
    """The bytes that are sent for ``update``; without ``bits`` floats as they are, as are the tensors of ``whole``."""
    sparse = {name: value for name, value in update.items() if name not in whole and value.numel()}
    masks = largest(sparse, sparsity) if sparse else {}
    message: dict[str, Representation] = {}
    for name, value in update.items():
        if name not in masks:
            message[name] = dense_representation(value)
        elif bits is None:
            message[name] = dense_representation(torch.where(masks[name], value, torch.zeros_like(value)))
        else:
            message[name] = coded(value, masks[name], bits)
    return encode(message, coders=("adaptive",))


def unpacked(data: bytes) -> Tensors:
    """What the receiver makes of them."""
    with open_file(data) as archive:
        return {name: from_numpy(np.array(archive.get(name)), archive.dtype(name)) for name in archive}


class Sender:
    """Sends updates and keeps what a message leaves out, to send it later (error feedback).

    ``whole``: names of the tensors that are sent as they are.
    """

    def __init__(
        self, sparsity: float = 0.0, bits: int | None = None, *, feedback: bool = False, whole: Collection[str] = ()
    ) -> None:
        self.sparsity, self.bits, self.feedback, self.whole = sparsity, bits, feedback, frozenset(whole)
        self.residual: Tensors = {}

    def send(self, update: Tensors) -> tuple[bytes, Tensors]:
        """The message for ``update`` and what earlier messages left out, and what arrives."""
        due = {name: value + self.residual[name] if name in self.residual else value for name, value in update.items()}
        message = packed(due, self.sparsity, self.bits, self.whole)
        arrived = unpacked(message)
        if self.feedback:
            self.residual = {name: value - arrived[name] for name, value in due.items() if name not in self.whole}
        return message, arrived
