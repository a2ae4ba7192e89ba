"""A fresh copy of a trained network: another student, or the next generation."""

from __future__ import annotations

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.train.fresh import initialise


def afresh(model: nn.Module, context: Context, salt: str) -> nn.Module:
    """``model`` itself, every layer that knows how begun again. Raises ``ModelError`` where none does."""
    done, _ = initialise(model, context, salt)
    if not done:
        raise ModelError(
            f"no layer of {type(model).__name__} has a reset_parameters method, so that no fresh copy can be made. "
            "Name fresh networks in models() instead."
        )
    return model
