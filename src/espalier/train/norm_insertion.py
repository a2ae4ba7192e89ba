"""Batch norms behind trained layers, which leave the network's function as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.insert import Insert, inserted
from espalier.core.model import device_of
from espalier.core.plan import Plan
from espalier.core.task import to_device
from espalier.train.calls import Calls, calls, layers_named, meets
from espalier.train.looking import batches as first_batches
from espalier.train.looking import looking
from espalier.train.moments import NORMS, Moments

CLASSES: dict[type[nn.Module], str] = {
    nn.Linear: "BatchNorm1d", nn.Conv1d: "BatchNorm1d", nn.Conv2d: "BatchNorm2d", nn.Conv3d: "BatchNorm3d",
}  # fmt: skip
"""The norm for the outputs of a layer."""
NORMALISED = (*NORMS, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def insert_norms(
    model: nn.Module, layers: tuple[str, ...], context: Context, batches: int | None, who: str
) -> nn.Module:  # fmt: skip
    """``model`` with a norm behind each of ``layers`` (patterns), set by what comes out of them on ``batches``."""
    chosen = layers_named(model, layers, tuple(CLASSES), context, who)
    norms = {path: module for path, module in model.named_modules() if isinstance(module, NORMALISED)}
    seen = calls(model, context, {**chosen, **norms})
    behind = [tensor for path in norms for tensor in seen.inputs.get(path, [])]
    plan = []
    for path, layer in chosen.items():
        reason = _refusal(path, layer, seen, behind, named=layers != ("*",))
        if reason:
            context.skip(path or "(model)", reason)
            continue
        kind = next(name for cls, name in CLASSES.items() if isinstance(layer, cls))
        features = seen.outputs[path][0].shape[1]
        plan.append(Insert(path=path, side="after", spec={"class": kind, "args": {"num_features": features}}))
    found = _measured(model, {edit.path: chosen[edit.path] for edit in plan}, context, batches)
    model = Plan(tuple(plan)).apply(model)
    for path, moments in found.items():
        norm: Any = inserted(model.get_submodule(path), "after")
        with torch.no_grad():
            moments.put_into(norm)
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
    if not chosen:
        context.skip("(model)", "it has no linear layer or convolution to put a norm behind")
    context.record.details["inserted"] = list(found)
    return model


def _refusal(path: str, layer: Any, seen: Calls, behind: list[Tensor], *, named: bool) -> str:
    outputs = seen.outputs.get(path, [])
    if not outputs:
        return "its forward is not called, so nothing can be put behind it"
    if len(outputs) > 1:
        return f"it runs {len(outputs)} times for one answer, and one norm would mix the statistics"
    if inserted(layer, "after") is not None or meets(outputs[0], behind):
        return "its output is normalised already"
    if outputs[0].ndim != (2 if isinstance(layer, nn.Linear) else layer.weight.ndim):
        return f"its channels are not dimension 1 of its output {tuple(outputs[0].shape)}, where a batch norm has them"
    if not named and meets(outputs[0], seen.answered):
        return "it gives the model's answer; name it in layers to normalise that"
    return ""


def _measured(
    model: nn.Module, layers: dict[str, nn.Module], context: Context, batches: int | None
) -> dict[str, Moments]:  # fmt: skip
    """What comes out of ``layers`` in eval mode, behind their own hooks."""
    found = {path: Moments() for path in layers}
    if not layers:
        return found

    def measure(moments: Moments, _: nn.Module, __: Any, output: Tensor) -> None:
        moments.add(output)

    handles = [layer.register_forward_hook(partial(measure, found[path])) for path, layer in layers.items()]
    try:
        with looking(model, context, grad=False):
            if batches is not None:
                for batch in first_batches(model, context, batches, "statistics"):
                    context.data.predict(model, batch)
            else:
                for batch in context.data.data("train"):
                    context.data.predict(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found
