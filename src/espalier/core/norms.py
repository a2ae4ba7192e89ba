"""Batch norms are a scale and a shift per channel: folded into the layer before, or reduced to just that."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.core.edits import Edit, module_at, put_module
from espalier.core.errors import ModelError
from espalier.core.parametrize import bake, require_phase, slots

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm in eval mode as ``scale * x + shift`` per channel, computed in float64, shape (channels,)."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = norm.weight.double() if norm.weight is not None else torch.ones_like(mean)
    bias = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
    scale = weight / torch.sqrt(var + norm.eps)
    dtype = norm.running_mean.dtype
    return scale.to(dtype), (bias - mean * scale).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Fold(Edit):
    """Fold the batch norm at ``norm`` into the convolution or linear layer at ``into`` that feeds it alone."""

    kind: ClassVar[str] = "fold"
    norm: str
    into: str

    def apply(self, model: nn.Module) -> None:
        """w <- w * g / sqrt(v + eps); b <- (b - m) * g / sqrt(v + eps) + beta; the norm becomes an identity."""
        norm, layer = module_at(model, self.norm), module_at(model, self.into)
        if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or norm.running_var is None:
            raise ModelError(f"{self.norm} is no batch norm with running statistics; it cannot be folded.")
        slot = slots(model).get(f"{self.into}.weight")
        if slot is None or not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise ModelError(f"{self.into} is no linear or convolution layer; a batch norm cannot be folded into it.")
        if norm.num_features != slot.shape[0] or len(slot.owners) > 1:
            raise ModelError(
                f"{self.norm} ({norm.num_features} channels) cannot be folded into {self.into}: its weight "
                f"{tuple(slot.shape)} {'is shared by ' + ', '.join(slot.names) if len(slot.owners) > 1 else 'differs'}."
            )
        require_phase(slot, ("dense", "mask"), f"folding {self.norm}")
        with torch.no_grad():
            scale, shift = scale_and_shift(norm)
            slot.latent.mul_(scale.reshape(-1, *[1] * (slot.latent.ndim - 1)))
            bias = shift if layer.bias is None else shift + layer.bias * scale
            layer.bias = nn.Parameter(bias, requires_grad=slot.latent.requires_grad)
        put_module(model, self.norm, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Normalise(Edit):
    """Turn every batch norm matching ``path`` into the same function with mean 0 and variance 1 - eps.

    What is left to store is a scale and a shift per channel. Norms without weights or statistics stay as they are.
    """

    kind: ClassVar[str] = "normalise"
    path: str = "*"

    def apply(self, model: nn.Module) -> None:
        """Rewrite weight and bias; the function in eval mode is the same to rounding."""
        norms = self.norms(model)
        owners = {id(norm) for _, norm in norms}
        for slot in slots(model).values() if norms else ():
            # what a form computes cannot be written to: the old scale would stay beside the new statistics
            if slot.form is not None and any(id(module) in owners for _, module, _ in slot.owners):
                bake(slot)
        for _, norm in norms:
            with torch.no_grad():
                scale, shift = scale_and_shift(norm)
                norm.weight.copy_(scale)
                norm.bias.copy_(shift)
            self.reset(norm)

    def norms(self, model: nn.Module) -> list[tuple[str, Any]]:
        """The batch norms this edit works on."""
        return [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, BATCH_NORMS)
            and module.affine
            and module.track_running_stats
            and fnmatch.fnmatchcase(path, self.path)
        ]

    @staticmethod
    def reset(norm: Any) -> None:
        """Set the statistics to mean 0, variance 1 - eps, no batch seen."""
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()

    def statistics(self, model: nn.Module) -> set[str]:
        """Names of the buffers that need no storing once the edit is applied."""
        kept = ("running_mean", "running_var", "num_batches_tracked")
        return {f"{path}.{name}" if path else name for path, _ in self.norms(model) for name in kept}
