"""Which layers one batch comes to, in what order, and what goes into them and out of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from espalier.core.context import Context
from espalier.core.selection import select
from espalier.train.looking import batches, looking


@dataclass
class Calls:
    """``order``: paths as they were called. ``inputs``, ``outputs``: the first tensor of each call, by path.

    ``given``, ``answered``: the tensors the model was called with and those it gave.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)
    answered: list[Tensor] = field(default_factory=list)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def meets(one: Tensor, others: list[Tensor]) -> bool:
    """Whether ``one`` is one of ``others``, or a view of it."""
    return any(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)


def calls(model: nn.Module, context: Context, modules: Mapping[str, nn.Module]) -> Calls:
    """What the first training batch, in eval mode, shows of ``modules`` (path -> module)."""
    found = Calls()

    def enter(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        found.order.append(path)
        found.inputs.setdefault(path, []).extend(tensors((args, kwargs))[:1])

    def leave(path: str, _: nn.Module, __: Any, output: Any) -> None:
        found.outputs.setdefault(path, []).extend(tensors(output)[:1])

    def given(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.given.extend(tensors((args, kwargs)))

    def answered(_: nn.Module, __: Any, output: Any) -> None:
        found.answered.extend(tensors(output))

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(leave, path)).remove)
        stack.callback(model.register_forward_pre_hook(given, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(answered).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, 1, "order of the layers"):
            context.data.predict(model, batch)
    return found


def layers_named(
    model: nn.Module, patterns: tuple[str, ...], kinds: tuple[type[nn.Module], ...], context: Context, who: str
) -> dict[str, nn.Module]:
    """Path -> the layers of ``kinds`` whose weights answer to ``patterns``; what is named and no such layer is skipped.

    A pattern that matches no weight raises ``UnknownNameError`` with close names.
    """
    every = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if patterns == ("*",):
        return every
    found: dict[str, nn.Module] = {}
    for slot in select(model, patterns, who=who):
        paths = [path for path, _, _ in slot.owners if path in every]
        found.update((path, every[path]) for path in paths)
        if not paths:
            context.skip(slot.name, f"it is no weight of {' or '.join(sorted({cls.__name__ for cls in kinds}))}")
    return found
