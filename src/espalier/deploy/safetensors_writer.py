"""The dense state of a model as a safetensors file; tied tensors once, the other names in the metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.core.errors import Corrupt, ModelError


def write_safetensors(model: nn.Module, path: Path) -> None:
    """Write the state dict; ``safetensors.torch.load_model`` puts it back. Raises ``ModelError`` for other state."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    state = model.state_dict(keep_vars=True)
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ModelError(f"{other[0]} is extra state that is no tensor; safetensors holds tensors only.")
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(value), name) for name, value in state.items()}
    kept = {name: state[name].detach().contiguous().clone() for name, source in ties.items() if name == source}
    try:
        save_file(kept, path, metadata={name: source for name, source in ties.items() if name != source} or None)
    except SafetensorError as error:
        raise ModelError(f"safetensors does not hold this model: {error}") from error
    again = load_file(path)
    for name, value in kept.items():
        if name not in again or not torch.equal(_bits(again[name]), _bits(value)):
            raise Corrupt(f"{path.name}: {name} read back differs from what was written; check the disk.")


def _bits(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8) if value.numel() else value.reshape(-1)
