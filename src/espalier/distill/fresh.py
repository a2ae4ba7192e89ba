"""Fresh values for a trained network: what its layers would have begun with, seeded."""

from __future__ import annotations

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError


def afresh(model: nn.Module, context: Context, salt: str) -> nn.Module:
    """``model`` itself, every layer that knows how begun again. Raises ``ModelError`` where none does."""
    done = 0
    with context.forked(salt), torch.no_grad():
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset) and not (own and not any(parameter.requires_grad for parameter in own)):
                reset()
                done += 1
    if not done:
        raise ModelError(
            f"no layer of {type(model).__name__} has a reset_parameters method, so that no fresh copy can be made. "
            "Name fresh networks in models() instead."
        )
    return model
