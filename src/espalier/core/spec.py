"""A module in a plan is a *spec*: a JSON tree over a closed list of ``torch.nn`` classes, rebuilt here only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from espalier.core.blocks import COMBINATORS, ChannelShuffle, First, Pad
from espalier.core.errors import Corrupt, LimitExceeded, did_you_mean

SPEC_CLASSES: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
        nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.Softmax,
        nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    )
}  # fmt: skip
"""What a spec may name of ``torch.nn``, beside what takes children (``COMBINATORS``) and ``PIECES``."""

PIECES: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (ChannelShuffle, First, Pad)}
"""Blocks without children of ``core/blocks.py``."""


MAX_ELEMENTS, MAX_DEPTH = 2**31, 64
"""How many elements the parameters and buffers of one spec may have, and how deep it may nest."""


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a spec: ``{"class": "Linear", "args": {...}}``, ``{"class": "Sequential", "children": [...]}``.

    Raises ``Corrupt`` for anything else, ``LimitExceeded`` before memory is taken for more than ``MAX_ELEMENTS``.
    """
    outline = outline_of(spec)
    elements = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if elements > MAX_ELEMENTS:
        raise LimitExceeded(f"a plan builds a module of {elements} elements; at most {MAX_ELEMENTS} are allowed.")
    return _build(spec, MAX_DEPTH)


def outline_of(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a spec on the meta device: shapes without values. Raises ``Corrupt``."""
    with torch.device("meta"):
        return _build(spec, MAX_DEPTH)


def _build(spec: Any, depth: int) -> nn.Module:
    if not isinstance(spec, Mapping) or not depth:
        raise Corrupt(f"a plan holds no module spec, or one nested deeper than {MAX_DEPTH}: {type(spec).__name__}.")
    name, children, given = spec.get("class"), spec.get("children", ()), spec.get("args", {})
    known: dict[str, type[nn.Module]] = {**SPEC_CLASSES, **PIECES, **COMBINATORS}
    if not isinstance(name, str) or name not in known:
        raise Corrupt(f"a plan names the module class {name!r}.{did_you_mean(str(name), known)}")
    if not isinstance(given, Mapping) or "device" in given:
        raise Corrupt(f"a plan builds {name} with {given!r}; arguments are a mapping and name no device.")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    if not isinstance(children, (list, tuple)) or (children and name not in COMBINATORS):
        raise Corrupt(f"a plan gives {name} children; {', '.join(COMBINATORS)} take a list of them, others none.")
    built = [_build(child, depth - 1) for child in children]
    try:
        return known[name](*built, **arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise Corrupt(f"a plan builds {name} with {arguments}, which it refuses: {error}") from error
