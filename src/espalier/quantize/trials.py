"""A weight as a quantizer would make it, and a model that runs on it for a while: what asks "what if" without doing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from espalier.core.forms import Mask
from espalier.core.parametrize import Slot
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.core.representation import Representation
from espalier.encode.coders import resolve, smallest
from espalier.encode.writer import hint_of
from espalier.quantize.places import output_axis

CODERS = ("rans", "huffman")


@dataclass(frozen=True)
class Trial:
    """A weight in ``bits`` bits: its effective ``value``, and how it would be ``stored``."""

    bits: int
    value: Tensor
    stored: Representation

    def coded_bytes(self) -> int:
        """Length as coded."""
        return coded_bytes(self.stored)


def coded_bytes(stored: Representation) -> int:
    """Length of all parts of a weight in the smaller of the fast coders, without header."""
    coders = resolve(CODERS)
    parts = stored.state()[1].items()
    return sum(len(smallest(v, coders, hint_of(stored, name))[1]) for name, v in parts if v.size)


def tried(slot: Slot, method: WeightQuantizer, bits: int) -> Trial:
    """The weight of ``slot`` as ``method`` begins it, with what an earlier step fixed kept; the slot stays as it is.

    A method that solves for its weights is tried as rounding to the nearest.
    """
    inner = copy.deepcopy(slot.form)
    start = slot.latent.detach().clone() if inner is not None and inner.flat else slot.value()
    form = QuantizedWeight(method, start, bits, axis=output_axis(slot), inner=inner, name=slot.name)
    latent = form.right_inverse(start)
    form.eval()
    with torch.no_grad():
        return Trial(bits, form(latent).detach(), form.freeze(latent))


def free_values(slot: Slot) -> int:
    """How many values of a weight a quantizer has a say in: without pruned ones, and shared ones once."""
    if isinstance(slot.form, Mask):
        return int(slot.form.mask.sum())
    return slot.latent.numel()


@contextmanager
def exchanged(slot: Slot, value: Tensor) -> Iterator[None]:
    """Within the block the model runs on ``value`` in place of the effective weight of ``slot``."""
    if slot.form is None:
        before = slot.latent.data
        slot.latent.data = value
        try:
            yield
        finally:
            slot.latent.data = before
        return
    vars(slot.form)["forward"] = partial(_instead, value)
    try:
        yield
    finally:
        vars(slot.form).pop("forward")


def _instead(value: Tensor, _: Tensor) -> Tensor:
    return value
