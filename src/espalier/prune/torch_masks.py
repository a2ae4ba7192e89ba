"""Masks of ``torch.nn.utils.prune`` read into our forms, and ours handed back in that form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from espalier.core.errors import ModelError
from espalier.core.forms import Mask
from espalier.core.model import register_reader
from espalier.core.parametrize import Slot, attach, bake, slots

ORIG, MASK = "_orig", "_mask"


def has_torch_masks(model: nn.Module) -> bool:
    """Whether any parameter is pruned by ``torch.nn.utils.prune``."""
    return any(True for module in model.modules() for _ in _pruned(module))


def copy_from_torch(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose torch masks are ours.

    torch leaves the masked weight as an attribute that carries a graph, which a plain deep copy refuses.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for _, name in _pruned(module):
            derived = module.__dict__[name]
            memo[id(derived)] = derived.detach().clone()
    return from_torch(copy.deepcopy(model, memo))


def _pruned(module: nn.Module) -> list[tuple[int, str]]:
    """(key of the hook, parameter name) of everything that torch prunes in this module."""
    return [
        (key, str(hook._tensor_name))
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, torch_prune.BasePruningMethod)
    ]


def from_torch(model: nn.Module) -> nn.Module:
    """Turn torch's masks into :class:`Mask` forms, in place, and return ``model``; the function stays the same.

    Raises ``ModelError`` where a mask holds anything but 0 and 1, or tied weights are masked differently: a form
    belongs to the parameter, at all its owners.
    """
    masks: dict[int, Tensor] = {}
    owners: dict[int, set[tuple[str, str]]] = {}
    found = [
        (path, module, key, name)
        for path, module in model.named_modules()
        for key, name in _pruned(module)
    ]  # fmt: skip
    for path, module, _, name in found:
        original, mask = module._parameters[name + ORIG], module._buffers[name + MASK]
        where = f"{path}.{name}" if path else name
        assert original is not None  # noqa: S101 - torch registers both together
        assert mask is not None  # noqa: S101
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ModelError(
                f"{where} carries a torch pruning mask with values other than 0 and 1. Make it permanent first: "
                "torch.nn.utils.prune.remove(module, name)."
            )
        if not torch.equal(masks.setdefault(id(original), mask.bool()), mask.bool()):
            raise ModelError(f"{where} is tied to a weight that carries another mask. Give both the same mask.")
        owners.setdefault(id(original), set()).add((path, name))
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            plain = name.removesuffix(ORIG)
            if parameter is not None and id(parameter) in masks and (path, plain) not in owners[id(parameter)]:
                raise ModelError(
                    f"{path}.{name} is tied to a weight that torch prunes, but is not pruned itself. "
                    "Prune it with the same mask."
                )
    wanted = []
    for _, module, key, name in found:
        parameter = module._parameters[name + ORIG]
        assert parameter is not None  # noqa: S101
        wanted.append((id(parameter), masks[id(parameter)]))
        _restore(module, key, name, parameter)
    by_id = dict(wanted)
    for slot in slots(model).values():
        if id(slot.latent) in by_id:
            attach(slot, Mask(by_id[id(slot.latent)].clone()))
    return model


def _restore(module: nn.Module, key: int, name: str, parameter: nn.Parameter) -> None:
    """Give the module its parameter back under its own name, where layers have it: weights before biases."""
    del module._forward_pre_hooks[key]
    del module._parameters[name + ORIG]
    del module._buffers[name + MASK]
    module.__dict__.pop(name, None)
    rest = dict(module._parameters)
    order = list(module._flat_weights_names) if isinstance(module, nn.RNNBase) else ["weight", "in_proj_weight"]
    module._parameters.clear()
    together = {name: parameter, **rest}
    for known in sorted(together, key=lambda n: order.index(n) if n in order else len(order)):
        module._parameters[known] = together[known]
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]


def to_torch(model: nn.Module) -> nn.Module:
    """Turn :class:`Mask` forms into masks of ``torch.nn.utils.prune``, in place; other forms stay."""
    for slot in list(slots(model).values()):
        if isinstance(slot.form, Mask):
            mask = slot.form.mask.clone()
            latent = slot.latent.detach().clone()
            bake(slot)
            with torch.no_grad():
                slot.latent.copy_(latent)  # torch keeps the values under the mask as well
            _hand_over(slot, mask)
    return model


def _hand_over(slot: Slot, mask: Tensor) -> None:
    for module, name in {(id(module), name): (module, name) for _, module, name in slot.owners}.values():
        torch_prune.custom_from_mask(module, name, mask.to(slot.latent.dtype))  # type: ignore[no-untyped-call]


register_reader(has_torch_masks, copy_from_torch)
