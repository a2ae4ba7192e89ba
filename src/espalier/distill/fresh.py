"""A fresh copy of a trained network: another student, or the next generation."""

from __future__ import annotations

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.train.fresh import initialise


def afresh(model: nn.Module, context: Context, salt: str) -> nn.Module:
    """``model`` itself, every layer that knows how begun again. Raises ``ModelError`` where none does.

    What keeps its trained values is recorded as skipped.
    """
    done, left = initialise(model, context, salt)
    if not done:
        raise ModelError(
            f"no layer of {type(model).__name__} has a reset_parameters method, so that no fresh copy can be made. "
            "Name fresh networks in models() instead."
        )
    for path in left:
        frozen = not any(own.requires_grad for own in model.get_submodule(path).parameters(recurse=False))
        reason = "frozen" if frozen else "it has parameters and no reset_parameters method"
        context.skip(path or "the model itself", f"{reason}: it keeps its trained values")
    return model
