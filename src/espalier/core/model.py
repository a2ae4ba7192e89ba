"""A user's model as espalier handles it: copied once, modes restored, never modified."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from espalier.core.errors import ModelError, NumericError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_READERS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], nn.Module]]] = []


def register_reader(present: Callable[[nn.Module], bool], copy_of: Callable[[nn.Module], nn.Module]) -> None:
    """Where ``present(model)``, :func:`copy_model` is ``copy_of(model)``: how other tools' marks become forms."""
    _READERS.append((present, copy_of))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers; a model that is not wrapped is itself."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    return model


def _is_quantized(module: nn.Module) -> bool:
    """Whether a layer itself holds torch's packed or quantized tensors; what only watches or simulates does not."""
    home, kind = type(module).__module__.split("."), type(module).__name__
    if home[0] == "torch" and "quantized" in home and "reference" not in home:
        return "FloatFunctional" not in kind  # lives there, and is float
    own = (*module._parameters.values(), *module._buffers.values())
    return any(isinstance(tensor, torch.Tensor) and tensor.is_quantized for tensor in own)


def require_float(model: nn.Module) -> None:
    """Raise ``ModelError`` naming the layers that torch has quantized: they have no weights to work on."""
    found = [(path or "the model itself", type(module)) for path, module in model.named_modules()
             if _is_quantized(module)]  # fmt: skip
    found = [(path, cls) for path, cls in found if not any(path.startswith(f"{other}.") for other, _ in found)]
    if found:
        names = ", ".join(f"{path} ({cls.__module__}.{cls.__name__})" for path, cls in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"the model is quantized already: {names}{more}. Weights must be floating-point tensors to be compressed: "
            "give the float model, as it was before torch.ao.quantization; share.kmeans stores it in few bits."
        )


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy: tied stays tied, frozen stays frozen, hooks are kept. Raises ``ModelError`` if it cannot be made.

    Data-parallel and compiled wrappers are taken off, inside as well: parameters have the names of the bare model.
    Every technique passes here, so what torch has quantized already is refused here.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module; got {type(model).__name__}.")
    model = unwrapped(model)
    require_float(model)
    for module in model.modules():  # a moved recurrent layer holds on to effective weights, which carry a graph
        if isinstance(module, nn.RNNBase) and any(
            weight is not None and not weight.is_leaf for weight in module._flat_weights
        ):
            module.__dict__["_flat_weights"] = []
    try:
        made = next((copy_of(model) for present, copy_of in _READERS if present(model)), None)
        made = copy.deepcopy(model) if made is None else made
        for parent in list(made.modules()):
            for name, child in parent.named_children():
                if unwrapped(child) is not child:
                    setattr(parent, name, unwrapped(child))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Keep only parameters, "
            "buffers, modules and plain values as attributes; call .detach() on tensors that carry a graph."
        ) from error
    return made


def modes(model: nn.Module) -> dict[str, bool]:
    """Module path -> whether it is in training mode."""
    return {path: module.training for path, module in model.named_modules()}


def set_modes(model: nn.Module, training: dict[str, bool]) -> nn.Module:
    """Give every module the mode recorded for its path; a new module takes its nearest recorded parent's."""
    for path, module in model.named_modules():
        while path not in training and path:
            path = path.rpartition(".")[0]
        module.training = training.get(path, module.training)
    return model


@contextmanager
def keep_mode(model: nn.Module) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Yield a function that gives another model the modes ``model`` has now; ``model`` itself is restored at exit."""
    before = modes(model)
    try:
        yield lambda other: set_modes(other, before)
    finally:
        set_modes(model, before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode without gradients; its modes are restored at exit."""
    before = modes(model)
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        set_modes(model, before)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor in C order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the state dict; what ``get_extra_state`` adds may be anything, and is no value of the model."""
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            yield name, value


def digest(model: nn.Module) -> int:
    """A checksum over structure and values: equal before and after a step means the step changed nothing."""
    value = zlib.crc32(repr(model).encode())
    for name, tensor in _state(model):
        value = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor_bytes(tensor), value)
    return value


def check_finite(model: nn.Module, when: str) -> None:
    """Raise ``NumericError`` naming the first tensor with NaN or infinity, ``ModelError`` for quantized layers.

    A buffer may hold infinities, as masks of attention do, unless it is a norm's statistic or part of a weight's form.
    """
    require_float(model)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in _state(model):
        if not tensor.is_floating_point():
            continue
        mask = name in buffers and "parametrizations" not in name and ".running_" not in f".{name}"
        bad = int((tensor.isnan() if mask else ~tensor.isfinite()).sum())
        if bad:
            raise NumericError(
                f"{name} holds {bad} NaN or infinite of {tensor.numel()} values {when}. "
                "Weights must be finite: check the training (a lower learning rate), or load an earlier checkpoint."
            )
