"""Circulant layers that multiply by FFT: for running a model in torch, where its layers are large."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.edits import put_module
from espalier.core.errors import ModelError
from espalier.core.forms import Form
from espalier.core.model import copy_model
from espalier.core.parametrize import Slot, slots
from espalier.core.structures import Circulant
from espalier.core.structures.stored import Structured


class CirculantLinear(nn.Module):
    """``F^-1(F c * F(d * x))`` summed over the blocks of a row, plus the bias. Inputs: (..., in), of any float type.

    The product is computed in float32 at least.
    """

    spectrum: Tensor

    def __init__(self, structure: Circulant, columns: Tensor, bias: nn.Parameter | None) -> None:
        """``columns``: as :class:`Circulant` has them, for one position."""
        super().__init__()
        self.out_features, self.in_features = structure.shape
        self.block, self.bias = structure.block, bias
        if columns.dtype != torch.float64:
            columns = columns.float()
        spectrum = torch.fft.rfft(columns[:, :, 0]).permute(2, 1, 0).contiguous()  # (frequency, across, down)
        self.register_buffer("spectrum", spectrum)
        flips = None if structure.signs is None else torch.from_numpy(structure.signs[:, 0]).to(columns)
        self.register_buffer("signs", flips)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).to(self.spectrum.real.dtype)
        if isinstance(self.signs, Tensor):
            flat = flat * self.signs
        padded = F.pad(flat, (0, self.spectrum.shape[1] * self.block - self.in_features))
        parts = torch.fft.rfft(padded.reshape(len(flat), -1, self.block)).permute(2, 0, 1)  # (frequency, batch, across)
        rows = torch.fft.irfft((parts @ self.spectrum).permute(1, 2, 0), self.block)
        answer: Tensor = rows.reshape(len(flat), -1)[:, : self.out_features].to(x.dtype)
        answer = answer.reshape(*x.shape[:-1], self.out_features)
        return answer if self.bias is None else answer + self.bias


def by_fft(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose ``nn.Linear`` layers with circulant weights multiply by FFT; equal up to rounding.

    Layers whose owner reads their weights itself stay: those of attention, and of ``nn.TransformerEncoderLayer``. It is
    for running in torch: files and checkpoints are made of ``model`` itself. Raises ``ModelError`` where there is no
    layer to change.
    """
    model = copy_model(model)
    read = {
        id(child) for owner in model.modules() if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        for child in owner.children()
    }  # fmt: skip
    found = [(slot, stored) for slot in slots(model).values() if (stored := _circulant(slot, read)) is not None]
    if not found:
        raise ModelError(
            "no nn.Linear of this model, outside of attention and TransformerEncoderLayer, has a circulant weight; "
            "share.circulant makes them."
        )
    for slot, stored in found:
        columns = torch.from_numpy(stored.parts["columns"].dense()).to(slot.latent)
        assert isinstance(stored.structure, Circulant)  # noqa: S101 - see _circulant
        layers: dict[int, CirculantLinear] = {}
        for path, module, _ in slot.owners:
            made = CirculantLinear(stored.structure, columns, module._parameters["bias"]).train(module.training)
            put_module(model, path, layers.setdefault(id(module), made))
    return model


def _circulant(slot: Slot, read: Container[int]) -> Structured | None:
    plain = all(
        type(module).__name__.removeprefix("Parametrized") == "Linear" and path and id(module) not in read
        for path, module, _ in slot.owners
    )
    if not plain or not isinstance(slot.form, Form):
        return None
    stored = slot.form.freeze(slot.latent)
    return stored if isinstance(stored, Structured) and isinstance(stored.structure, Circulant) else None
