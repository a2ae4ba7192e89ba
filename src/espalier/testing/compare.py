"""What the contract compares: a model down to its bits, its answers, its frozen form."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.forms import from_numpy
from espalier.core.model import evaluating, modes, tensor_bytes
from espalier.core.parametrize import freeze, plain, slots
from espalier.core.task import Task
from espalier.encode import encode, open_file

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bits(value: Any) -> Any:
    """A nested value with every tensor as (dtype, shape, bytes): equal only if equal bit for bit."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), bytes(tensor_bytes(value))
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (tuple, list)) else value


def interface(value: Any) -> Any:
    """A nested output with every tensor as (dtype, shape), containers by type."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, Mapping):
        return type(value), {key: interface(item) for key, item in value.items()}
    return (type(value), [interface(item) for item in value]) if isinstance(value, (tuple, list)) else type(value)


def hooks(model: nn.Module) -> dict[tuple[str, str], list[Any]]:
    """(module path, kind of hook) -> the hooks, in order."""
    return {(path, kind): list(getattr(m, kind).values()) for path, m in model.named_modules() for kind in HOOKS}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a technique must leave alone in its argument: values, gradients, identities, classes, modes, hooks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "state": {name: (id(value), bits(value)) for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": {name: (id(parameter.grad), bits(parameter.grad)) for name, parameter in parameters.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "classes": {path: (id(module), type(module)) for path, module in model.named_modules()},
        "modes": modes(model),
        "hooks": hooks(model),
    }


def outputs(model: nn.Module, task: Task) -> list[Any]:
    """What ``model`` answers on the validation batches, in eval mode."""
    with evaluating(model):
        return [task.predict(model, batch) for batch in task.data("val")]


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> the weight in force."""
    return {name: slot.value() for name, slot in slots(model).items()}


def frozen_copy(model: nn.Module, *, through_file: bool = False) -> nn.Module:
    """The plain structure of ``model``, every stored tensor wiped and then filled from ``freeze(model)`` alone.

    ``through_file``: from the bytes of a file that holds the frozen tensors.
    """
    tensors, aliases = freeze(model)
    if through_file:
        with open_file(encode(tensors, aliases=aliases)) as archive:
            tensors = {name: archive.representation(name) for name in archive}
            aliases = archive.aliases
    host = plain(model)
    stored = {name: from_numpy(frozen.dense(), frozen.dtype).reshape(frozen.shape) for name, frozen in tensors.items()}
    with torch.no_grad():
        for value in host.state_dict().values():
            value.fill_(1)
    host.load_state_dict(stored | {name: stored[source] for name, source in aliases.items()})
    return host


def storages(model: nn.Module) -> set[int]:
    """Where the tensors of ``model`` lie in memory."""
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def generators() -> tuple[Any, ...]:
    """The state of the global generators of torch, Python and NumPy."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
