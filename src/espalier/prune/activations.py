r"""Activation functions removed where they do not matter, and the linear layers that meet made one.

Paper    Dror, Zehngut, Raviv, Artyomov, Vitek, Jevnisek. Layer Folding: Neural Network Depth Reduction using Activation
         Linearization. 2021. arXiv:2106.09309
         Fu, Yang, Yuan, Li, Wan, Lin. DepthShrinker. ICML 2022. arXiv:2206.00843
Formula  f <- (1 - k) f + k identity, k from 0 to 1;   W = W2 W1 (kernels convolved), only if it has fewer weights, or
         only if it was measured faster
Departs  k is annealed by the schedule instead of learned; which functions go is measured (distance of the outputs on
         val), one at a time, each measured anew. Functions called without a module (F.relu) are listed and left. A
         module that a forward pass calls several times is one function: all its calls go, or none; one that stands at
         several places is one function at each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.edits import Remove
from espalier.core.errors import ModelError
from espalier.core.fields import Batches
from espalier.core.metric import first_tensor
from espalier.core.model import copy_model, device_of, evaluating
from espalier.core.parametrize import slots
from espalier.core.plan import Plan
from espalier.core.task import capture_call, to_device
from espalier.prune.layers import how_many, skipped
from espalier.prune.merging import graph_of, merge_linear
from espalier.prune.removing import Removing, final_sparsity

if TYPE_CHECKING:
    from espalier.prune.prune import Prune

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.PReLU,
)  # fmt: skip
FUNCTIONS = frozenset(
    {"relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "celu", "hardswish", "prelu"}
)


@dataclass(frozen=True, kw_only=True)
class Activations(Removing):
    """``sparsity`` is the share of the activation functions that goes; with ``epochs`` they fade while training.

    ``merge``: make one layer of two linear layers that meet where that takes fewer weights (``smaller``), where it was
    measured on the task's example to be faster, beyond the spread (``faster``), or ``never``. ``batches``: how many val
    batches an impact is measured on.
    """

    id: ClassVar[str] = "activations"
    merge: Literal["smaller", "faster", "never"] = "smaller"
    batches: Batches = 4

    def misfits(self, method: Prune) -> list[str]:
        return [*super().misfits(method), *self.no_say(method, criterion=True, scope=True)]

    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """Choose by impact, fade or remove, merge."""
        places = split_places(model)
        for node in graph_of(model, context).nodes:
            if node.op in FUNCTIONS and node.path not in places:
                context.skip(f"{node.op} in {node.path or 'the model'}", "called as a function, not as a module")
        paths = _called(model, context, places)
        if not paths:
            raise ModelError(
                f"{method.name}: {type(model).__name__} calls no activation module; write activations as modules "
                "(nn.ReLU() in place of F.relu) so that they can be taken out."
            )
        count = how_many(final_sparsity(method), len(paths))
        with out_of_place([model.get_submodule(path) for path in paths]):
            chosen = self._choose(model, context, paths, count)
            if method.epochs:
                fade = _Fade(method, model, chosen)
                method.train(model, context, callbacks=(fade,), settled=max(0, method.epochs - 1))
        Plan(tuple(Remove(path=path) for path in chosen)).apply(model)
        merged = merge_linear(model, context, self.merge) if self.merge != "never" else []
        context.record.details |= {"activations": len(paths), "removed": chosen, "merged": merged}
        return model

    def _choose(self, model: nn.Module, context: Context, paths: list[str], count: int) -> list[str]:
        """The functions whose absence changes the outputs least, one after the other."""
        gone: list[str] = []
        while len(gone) < count:
            scores = self._distances(model, context, gone, [path for path in paths if path not in gone])
            gone.append(min(scores, key=lambda path: scores[path]))
            context.progress("activations", len(gone), count)
        return gone

    def _distances(self, model: nn.Module, context: Context, gone: list[str], left: list[str]) -> dict[str, float]:
        """How far the outputs are from those of the whole model without ``gone`` and each of ``left``."""
        task, total = context.data, dict.fromkeys(left, 0.0)
        split = "val" if task.val is not None else "train"
        with evaluating(model):
            for number, batch in enumerate(task.data(split)):  # type: ignore[arg-type]
                if number == self.batches:
                    break
                moved = to_device(batch, device_of(model))
                whole = first_tensor(task.predict(model, moved))
                for path in left:
                    with ExitStack() as stack:
                        for other in (*gone, path):
                            stack.enter_context(skipped(model.get_submodule(other)))
                        without = first_tensor(task.predict(model, moved))
                    total[path] += float((without - whole).square().sum() / whole.square().sum().clamp_min(1e-30))
        return total


def split_places(model: nn.Module) -> list[str]:
    """Paths of all activation modules; one that stands at several places is copied, so that each can go alone.

    Copies share their parameters (PReLU). A module that carries forms stays one.
    """
    seen: set[int] = set()
    paths = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, ACTIVATIONS):
                continue
            if id(child) in seen:
                if any(slot.form is not None for slot in slots(child).values()):
                    continue
                twin = copy_model(child)
                twin._parameters.update(child._parameters)
                parent._modules[name] = twin
            seen.add(id(child))
            paths.append(f"{path}.{name}" if path else name)
    return paths


def _called(model: nn.Module, context: Context, paths: list[str]) -> list[str]:
    """The paths of what one forward pass calls; notes what it calls several times."""
    calls = dict.fromkeys(paths, 0)

    def count(path: str) -> Any:
        def hook(*_: Any) -> None:
            calls[path] += 1

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(count(path)) for path in paths]
    try:
        capture_call(context.data, model, context.data.example())
    finally:
        for handle in handles:
            handle.remove()
    for path, number in calls.items():
        if not number:
            context.skip(path, "the model does not call it")
    several = [f"{path} ({number} times)" for path, number in calls.items() if number > 1]
    if several:
        context.note(
            f"one forward pass calls {', '.join(several)}: all calls of a module stay or go together, as one function. "
            "Give each call a module of its own to have them judged one by one."
        )
    return [path for path, number in calls.items() if number]


@contextmanager
def out_of_place(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block the modules leave what they get as it is, so that they can be left out."""
    inplace = [module for module in modules if getattr(module, "inplace", False)]
    for module in inplace:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in inplace:
            module.inplace = True  # type: ignore[assignment]


class _Fade(Callback):
    """(1 - k) f(x) + k x while training; k follows the schedule and reaches 1 one epoch before the end."""

    def __init__(self, method: Prune, model: nn.Module, paths: list[str]) -> None:
        self.method, self.k = method, 0.0
        self.modules = [model.get_submodule(path) for path in paths]
        self.handles: list[Any] = []

    def on_start(self, loop: Loop) -> None:
        def mix(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.lerp(output, args[0], self.k)

        self.handles = [module.register_forward_hook(mix) for module in self.modules]

    def on_epoch_start(self, loop: Loop) -> None:
        done = (loop.epoch + 1) / max(1, loop.epochs - 1)
        self.k = self.method.schedule.share(min(1.0, done))

    def on_epoch(self, loop: Loop) -> None:
        if loop.epoch + 1 == loop.epochs:
            self.k = 1.0
            for handle in self.handles:
                handle.remove()
            self.handles = []
