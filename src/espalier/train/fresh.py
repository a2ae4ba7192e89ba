"""Fresh values for a trained network: what its layers would have begun with, seeded."""

from __future__ import annotations

import torch
from torch import nn

from espalier.core.context import Context


def initialise(model: nn.Module, context: Context, salt: str = "initialise") -> tuple[list[str], list[str]]:
    """Give every layer that knows how fresh values, seeded; returns the paths that got some and that did not."""
    done, left = [], []
    with context.forked(salt), torch.no_grad():
        for path, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            frozen = bool(own) and not any(parameter.requires_grad for parameter in own)
            if callable(reset) and not frozen:
                reset()
                done.append(path)
            elif own:
                left.append(path)
    return done, left
