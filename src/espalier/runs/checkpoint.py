"""Checkpoints: a model's state as safetensors, its plan and training forms as JSON beside it. No pickle.

Structure comes from the model the user gave: the plan is replayed on a copy of it, the forms are attached, then filled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from espalier.core.errors import RunError
from espalier.core.files import write_atomic
from espalier.core.model import copy_model
from espalier.core.parametrize import form_specs, restore_forms
from espalier.core.plan import Plan, applied, base, rebase


def distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor under its first name only."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state


def save_model(model: nn.Module, path: Path) -> None:
    """Write state, plan and forms into one safetensors file, atomically."""
    metadata = {
        "base": base(model), "forms": json.dumps(form_specs(model)), "plan": json.dumps(applied(model).to_json()),
    }  # fmt: skip
    write_atomic(path, save(distinct_state(model), metadata=metadata), parents=True)


def load_model(skeleton: nn.Module, path: Path, models: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A copy of ``skeleton`` in the checkpointed state; of the one of ``models`` that the checkpoint is based on.

    Raises ``RunError`` when the two do not fit.
    """
    tensors, metadata = _read(path)
    name = metadata.get("base", "original")
    skeleton = (models or {}).get(name, skeleton)
    plan = Plan.from_json(json.loads(metadata.get("plan", "[]")))
    model = Plan(plan.edits[len(applied(skeleton).edits) :]).apply(rebase(copy_model(skeleton), name))
    restore_forms(model, json.loads(metadata.get("forms", "{}")))
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise RunError(
            f"{path} does not fit this model: {error}. Resume with the model the run was started with."
        ) from error
    tied = set(model.state_dict()) - set(distinct_state(model))
    if unexpected or set(missing) - tied:
        wrong = sorted(set(missing) - tied) + list(unexpected)
        raise RunError(
            f"{path} does not fit this model ({', '.join(wrong[:5])}). Resume with the model the run was started with."
        )
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"the checkpoint {path} cannot be read ({error}). Delete its folder and resume: the step runs again."
        ) from error


class EpochFile:
    """The training loop's state after its last finished epoch, in one file that is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, epoch: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Replace the state."""
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        flat.setdefault("_", torch.zeros(1))
        flat = {name: tensor.clone() for name, tensor in flat.items()}
        write_atomic(self.path, save(flat, metadata={"epoch": str(epoch), "data": json.dumps(data)}), parents=True)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The state kept, or None."""
        if not self.path.exists():
            return None
        tensors, metadata = _read(self.path)
        tensors.pop("_", None)
        return int(metadata["epoch"]), tensors, json.loads(metadata["data"])
