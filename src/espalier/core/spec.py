"""A module in a plan is a *spec*: a JSON tree over a closed list of ``torch.nn`` classes, rebuilt here only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from espalier.core.errors import Corrupt, LimitExceeded, did_you_mean

SPEC_CLASSES: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.Softmax,
        nn.Identity, nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    )
}  # fmt: skip
"""What a spec may name beside ``Sequential``."""


MAX_ELEMENTS, MAX_DEPTH = 2**31, 64
"""How many elements the parameters and buffers of one spec may have, and how deep it may nest."""


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a spec: ``{"class": "Linear", "args": {...}}``, ``{"class": "Sequential", "children": [...]}``.

    Raises ``Corrupt`` for anything else, ``LimitExceeded`` before memory is taken for more than ``MAX_ELEMENTS``.
    """
    with torch.device("meta"):
        outline = _build(spec, MAX_DEPTH)
    elements = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if elements > MAX_ELEMENTS:
        raise LimitExceeded(f"a plan builds a module of {elements} elements; at most {MAX_ELEMENTS} are allowed.")
    return _build(spec, MAX_DEPTH)


def _build(spec: Any, depth: int) -> nn.Module:
    if not isinstance(spec, Mapping) or not depth:
        raise Corrupt(f"a plan holds no module spec, or one nested deeper than {MAX_DEPTH}: {type(spec).__name__}.")
    name, children, given = spec.get("class"), spec.get("children", ()), spec.get("args", {})
    if name == "Sequential" and isinstance(children, (list, tuple)):
        return nn.Sequential(*(_build(child, depth - 1) for child in children))
    if not isinstance(name, str) or name not in SPEC_CLASSES:
        raise Corrupt(
            f"a plan names the module class {name!r}.{did_you_mean(str(name), [*SPEC_CLASSES, 'Sequential'])}"
        )
    if not isinstance(given, Mapping) or "device" in given:
        raise Corrupt(f"a plan builds {name} with {given!r}; arguments are a mapping and name no device.")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        return SPEC_CLASSES[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Corrupt(f"a plan builds {name} with {arguments}, which it refuses: {error}") from error
