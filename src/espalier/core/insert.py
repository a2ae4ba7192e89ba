"""A plan's edit that puts a module before or after a layer, which keeps its name, its weights and its forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from espalier.core.edits import Edit, module_at
from espalier.core.errors import ModelError
from espalier.core.spec import build

Side = Literal["before", "after"]
"""Where the module stands; also its name below the layer."""


def inserted(layer: nn.Module, side: Side) -> nn.Module | None:
    """What an :class:`Insert` put there; None where nothing stands, or an identity that was left in its place."""
    found = layer._modules.get(side)
    hook = _enter if side == "before" else _leave
    hooks = layer._forward_pre_hooks if side == "before" else layer._forward_hooks
    return found if hook in hooks.values() and not isinstance(found, nn.Identity) else None


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    before = layer._modules["before"]
    assert before is not None  # noqa: S101 - the hook comes with the module
    if args:
        return (before(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": before(kwargs["input"])}


def _leave(layer: nn.Module, _: Any, output: Any) -> Any:
    after = layer._modules["after"]
    assert after is not None  # noqa: S101 - the hook comes with the module
    return after(output)


@dataclass(frozen=True, kw_only=True)
class Insert(Edit):
    """Put the module that ``spec`` describes before or after the layer at ``path``, as its child of that name."""

    kind: ClassVar[str] = "insert"
    path: str
    side: Side
    spec: dict[str, Any]

    def apply(self, model: nn.Module) -> None:
        """Insert, on the layer's device and in its dtype; frozen where the layer is. Raises ``ModelError``."""
        layer, made = module_at(model, self.path), build(self.spec).train(module_at(model, self.path).training)
        there = layer._modules.get(self.side)
        if inserted(layer, self.side) is not None or (there is None and hasattr(layer, self.side)):
            raise ModelError(
                f"{self.path or 'the model'} has a {self.side!r} already; nothing more can be put {self.side} it."
            )
        weight = next(iter(layer.parameters()), None)
        if weight is not None:
            made.to(weight.device, weight.dtype if weight.is_floating_point() else None)
            made.requires_grad_(weight.requires_grad)
        layer._modules[self.side] = made
        if self.side == "before" and _enter not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
        if self.side == "after" and _leave not in layer._forward_hooks.values():
            layer.register_forward_hook(_leave)

    def summary(self) -> str:
        given: Mapping[str, Any] = self.spec.get("args", {})
        said = ", ".join(f"{key}={value}" for key, value in given.items())
        return f"{self.spec.get('class')}({said}) {self.side} {self.path}"
