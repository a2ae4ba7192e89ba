"""How much of a network is really quantized: layers, parameters, multiply-adds, and why the rest is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.inputs import quantized_inputs
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.selection import weights
from espalier.quantize.places import Place


def coverage(model: nn.Module, places: Sequence[Place], context: Context) -> dict[str, Any]:
    """Plain data: bits of each weight and input, and the shares. Raises ``UsageError`` where nothing was quantized.

    ``parameters``: the share of all parameters whose weight is on a grid; ``layers``: of the weights of two dimensions
    or more. Layers that were left out stand among the step's skipped ones.
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
    covered = sum(found[name].shape.numel() for name in rows)
    total = sum(slot.shape.numel() for slot in found.values())
    return {
        "weights": rows,
        "inputs": inputs,
        "layers": f"{len(rows)} of {weights(model).count}",
        "parameters": covered / max(1, total),
    }
