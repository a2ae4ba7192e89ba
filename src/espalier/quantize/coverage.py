"""How much of a network is really quantized: layers, parameters, multiply-adds, and why the rest is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierError, UsageError
from espalier.core.inputs import quantized_inputs
from espalier.core.parametrize import plain, slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.selection import weights
from espalier.core.task import capture_call, to_device
from espalier.graph import macs, trace
from espalier.quantize.places import Place


def coverage(model: nn.Module, places: Sequence[Place], context: Context) -> dict[str, Any]:
    """Plain data: bits of each weight and input, and the shares. Raises ``UsageError`` where nothing was quantized.

    ``parameters``: the share of all parameters whose weight is on a grid; ``macs``: the share of the multiply-adds of
    such weights, None where the model cannot be traced; ``layers``: those whose weights are all on a grid, of those
    that have a weight of two dimensions or more. What was left out stands among the step's skipped ones.
    """
    found = slots(model)
    rows = {
        name: {"method": slot.form.method.name, "bits": slot.form.bits, "parameters": slot.shape.numel()}
        for name, slot in found.items() if isinstance(slot.form, QuantizedWeight)
    }  # fmt: skip
    inputs = {
        path: {"method": q.method.name, "bits": q.bits, "signed": q.signed}
        for path, q in quantized_inputs(model).items()
    }
    if not rows and not inputs and places:
        why = "; ".join(f"{row['name']}: {row['reason']}" for row in context.record.skipped[:5])
        raise UsageError(f"nothing was quantized: {why or 'no layer was chosen'}. Choose other layers, or ends=same.")
    layers = {slot.path for slot in weights(model)}
    open_ = {slot.path for slot in weights(model) if slot.name not in rows}
    covered = sum(found[name].shape.numel() for name in rows)
    total = sum(slot.shape.numel() for slot in found.values())
    return {
        "weights": rows,
        "inputs": inputs,
        "layers": f"{len(layers - open_)} of {len(layers)}",
        "parameters": covered / max(1, total),
        "macs": _share_of_macs(model, set(rows), context),
    }


def _share_of_macs(model: nn.Module, names: set[str], context: Context) -> float | None:
    if context.task is None:
        return None
    bare = plain(model).cpu().eval()
    try:
        args, kwargs = capture_call(context.task, bare, to_device(context.task.example(), torch.device("cpu")))
        counted = macs(trace(bare, args, kwargs))
    except (EspalierError, RuntimeError):
        return None
    return sum(count for name, count in counted.tensors.items() if name in names) / max(1, counted.total)
