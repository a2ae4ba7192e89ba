r"""A new head: the output layer starts afresh, with as many outputs as the task has classes.

Paper    Yosinski, Clune, Bengio, Lipson. How transferable are features in deep neural networks? NIPS 2014.
         arXiv:1411.1792
Formula  f = h o g, g trained on another task;   h <- a fresh layer of C outputs, uniform in +-1 / sqrt(fan-in)
Departs  None of the other layers is frozen or starts afresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.core.context import Context
from espalier.core.edits import Replace
from espalier.core.errors import DataError, ModelError, UnknownNameError, did_you_mean
from espalier.core.fields import Count
from espalier.core.method import Technique
from espalier.core.metric import first_tensor
from espalier.core.model import device_of, evaluating
from espalier.core.parametrize import Slot, bake, require_phase, slots
from espalier.core.plan import Plan
from espalier.core.spec import build
from espalier.core.task import to_device

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class NewHead(Technique):
    """Give the output layer ``classes`` outputs (0: as many as the labels name) and fresh values.

    ``head``: path of the layer; null takes the last linear layer or convolution that runs. ``fresh``: also where the
    number of outputs is right already.
    """

    id: ClassVar[str] = "new-head"
    changes_outputs: ClassVar[bool] = True
    head: str | None = None
    classes: Count = 0
    fresh: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Labels to count, and a batch to find the layer with."""
        return frozenset({"train", "labels"})

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Find the layer, put another in its place or fill it with fresh values."""
        path, layer, outputs = output_layer(model, self.head, context)
        named = self.classes or classes_of(context)
        has = _outputs(layer)
        weight = next(slot for slot in slots(model).values() if any(module is layer for _, module, _ in slot.owners))
        context.record.details["head"] = {"layer": path, "before": has, "after": named}
        if has == named and not self.fresh:
            context.skip(path, f"it has {has} outputs already")
            return model
        if len(weight.owners) > 1:
            if named > has:
                raise ModelError(
                    f"the output layer {path} has {has} outputs and shares its weight with "
                    f"{', '.join(weight.names[:3])}, so it cannot get {named}. Untie it in the model first."
                )
            context.skip(weight.name, f"its weight is shared by {', '.join(weight.names)}; a fresh one would part them")
            return model
        if has == named and not weight.latent.requires_grad:
            context.skip(weight.name, "it is frozen, and fresh values would have to be trained")
            return model
        spec = spec_of(layer, named)
        with context.forked("head"):
            fresh = build(spec)
        if has == named:
            return _refill(model, path, fresh, self.name)
        if outputs != has:
            raise ModelError(
                f"the last layer to run, {path}, gives {has} features, and the model hands back {outputs}: it is not "
                "the output layer. Name that one: head=path.to.layer."
            )
        if not path:
            raise ModelError("the whole model is one layer; build it with the right number of outputs instead.")
        if any(layer._forward_hooks.values()) or any(layer._forward_pre_hooks.values()):
            context.warn(f"the hooks of {path} went with it: the new output layer has none.")
        for slot in _own(model, path):
            bake(slot)
        model = Plan((Replace(path=path, spec=spec),)).apply(model)
        new = model.get_submodule(path)
        new.to(device=device_of(model), dtype=weight.latent.dtype)
        new.load_state_dict(fresh.state_dict())
        return model


def output_layer(model: nn.Module, head: str | None, context: Context) -> tuple[str, nn.Module, int]:
    """``(path, layer, classes the model's first output has)``: the named layer, or the last that runs.

    Raises ``UnknownNameError`` for a name of no such layer, ``ModelError`` where none runs.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
    ran: list[str] = []

    def note(path: str, *_: Any) -> None:
        ran.append(path)

    batch = to_device(context.data.example(), device_of(model))
    with ExitStack() as stack:
        for path, module in layers.items():
            stack.callback(module.register_forward_hook(partial(note, path)).remove)
        with evaluating(model):
            answer = first_tensor(context.data.predict(model, batch))
    if head is not None:
        if head not in layers:
            hint = did_you_mean(head, layers)
            raise UnknownNameError(f"head={head!r}: no linear layer or convolution has that path.{hint}")
        ran.append(head)
    if not ran:
        raise ModelError(
            f"{type(model).__name__} calls no linear layer or convolution as a module, so there is no output layer to "
            "replace. Give a model that has one."
        )
    return ran[-1], layers[ran[-1]], answer.shape[1] if answer.ndim > 1 else 1


def classes_of(context: Context) -> int:
    """1 + the largest label of the training data. Raises ``DataError`` for labels that are no class indices."""
    task, largest = context.data, -1
    for batch in task.data("train"):
        label = task.target(batch)
        if not isinstance(label, Tensor) or label.is_floating_point():
            raise DataError(
                "the labels are no class indices, so they cannot be counted; say how many outputs: classes=N."
            )
        largest = max(largest, int(label.max()))
    return largest + 1


def spec_of(layer: nn.Module, outputs: int) -> dict[str, Any]:
    """The spec of a layer like ``layer`` with ``outputs`` outputs."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return {"class": "Linear", "args": {"in_features": layer.in_features, "out_features": outputs, "bias": bias}}
    assert isinstance(layer, _ConvNd)  # noqa: S101 - one of LAYERS
    names = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    kind = type(layer).__name__.removeprefix("Parametrized")
    same = {name: getattr(layer, name) for name in names}
    return {"class": kind, "args": {**same, "out_channels": outputs, "bias": bias}}


def _outputs(layer: nn.Module) -> int:
    found = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(found, int)  # noqa: S101 - one of LAYERS
    return found


def _own(model: nn.Module, path: str) -> Iterator[Slot]:
    """The parameters of the layer at ``path``."""
    for slot in slots(model).values():
        if slot.path == path:
            yield slot


def _refill(model: nn.Module, path: str, fresh: nn.Module, who: str) -> nn.Module:
    """Fresh values in the layer as it is: its hooks and masks stay."""
    values = fresh.state_dict()
    for slot in _own(model, path):
        require_phase(slot, ("dense", "mask"), who)
        with torch.no_grad():
            slot.latent.copy_(values[slot.owners[0][2]])
    return model
