r"""Activation functions removed where they do not matter, and the linear layers that meet made one.

Paper    Dror, Zehngut, Raviv, Artyomov, Vitek, Jevnisek. Layer Folding: Neural Network Depth Reduction using Activation
         Linearization. 2021. arXiv:2106.09309
         Fu, Yang, Yuan, Li, Wan, Lin. DepthShrinker. ICML 2022. arXiv:2206.00843
Formula  f <- (1 - k) f + k identity, k from 0 to 1;   W = W2 W1 (kernels convolved), only if it has fewer parameters
Departs  k is annealed by the schedule instead of learned; which functions go is measured (distance of the outputs on
         val), one at a time, each measured anew. Functions called without a module (F.relu) are listed and left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError
from espalier.core.fields import Batches
from espalier.core.metric import first_tensor
from espalier.core.model import device_of, evaluating
from espalier.core.parametrize import plain
from espalier.core.plan import BATCH_NORMS, Fold, Merge, Plan, Remove, unmergeable
from espalier.core.task import capture_call, to_device
from espalier.graph import trace
from espalier.graph.graph import Graph, Node, Value, Weight, references
from espalier.prune.layers import how_many, skipped
from espalier.prune.structure import Removing, final_sparsity

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

    ``merge``: make one layer of two linear layers that meet, where that takes fewer parameters. ``batches``: how many
    val batches an impact is measured on.
    """

    id: ClassVar[str] = "activations"
    merge: bool = True
    batches: Batches = 4

    def misfits(self, method: Prune) -> list[str]:
        return [*super().misfits(method), *self.no_say(method, criterion=True, scope=True)]

    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """Choose by impact, fade or remove, merge."""
        paths = [path for path, module in model.named_modules() if isinstance(module, ACTIVATIONS)]
        graph = _graph(model, context)
        for node in graph.nodes:
            if node.op in FUNCTIONS and node.path not in paths:
                context.skip(f"{node.op} in {node.path or 'the model'}", "called as a function, not as a module")
        if not paths:
            raise ModelError(
                f"{method.name}: {type(model).__name__} holds no activation module; write activations as modules "
                "(nn.ReLU() in place of F.relu) so that they can be taken out."
            )
        count = how_many(final_sparsity(method), len(paths))
        chosen = self._choose(model, context, paths, count)
        if method.epochs:
            method.train(model, context, callbacks=(_Fade(method, model, chosen),), settled=max(0, method.epochs - 1))
        Plan(tuple(Remove(path=path) for path in chosen)).apply(model)
        merged = merge_linear(model, context) if self.merge else []
        context.record.details |= {"activations": len(paths), "removed": chosen, "merged": merged}
        return model

    def _choose(self, model: nn.Module, context: Context, paths: list[str], count: int) -> list[str]:
        """The functions whose absence changes the outputs least, one after the other."""
        gone: list[str] = []
        while len(gone) < count:
            scores = {path: self._distance(model, context, [*gone, path]) for path in paths if path not in gone}
            gone.append(min(scores, key=lambda path: scores[path]))
            context.progress("activations", len(gone), count)
        return gone

    def _distance(self, model: nn.Module, context: Context, without: list[str]) -> float:
        from contextlib import ExitStack

        task, total = context.data, 0.0
        split = "val" if task.val is not None else "train"
        with evaluating(model):
            for number, batch in enumerate(task.data(split)):  # type: ignore[arg-type]
                if number == self.batches:
                    break
                moved = to_device(batch, device_of(model))
                whole = first_tensor(task.predict(model, moved))
                with ExitStack() as stack:
                    for path in without:
                        stack.enter_context(skipped(model.get_submodule(path)))
                    other = first_tensor(task.predict(model, moved))
                total += float((other - whole).square().sum() / whole.square().sum().clamp_min(1e-30))
        return total


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
        self.k = self.method.schedule.sparsity(min(1.0, done), 1.0)

    def on_epoch(self, loop: Loop) -> None:
        if loop.epoch + 1 == loop.epochs:
            self.k = 1.0
            for handle in self.handles:
                handle.remove()
            self.handles = []


def _graph(model: nn.Module, context: Context) -> Graph:
    bare = plain(model)
    args, kwargs = capture_call(context.data, bare, to_device(context.data.example(), device_of(bare)))
    return trace(bare, args, kwargs)


def merge_linear(model: nn.Module, context: Context) -> list[str]:
    """Merge, in place, every pair of layers that meets and is smaller as one; batch norms between are folded first."""
    merged: list[str] = []
    while True:
        graph = _graph(model, context)
        plan = next((plan for pair in _meeting(graph, model) if (plan := _worth(model, pair))), None)
        if plan is None:
            return merged
        plan.apply(model)
        merged.append(str(plan.edits[-1]))


def _meeting(graph: Graph, model: nn.Module) -> list[tuple[str, str, str]]:
    """(first, batch norm between or "", second) for layers of which the second alone reads the first."""
    producers = {len(graph.inputs) + number: node for number, node in enumerate(graph.nodes)}
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for arg in references(node):
            if isinstance(arg, Value):
                readers.setdefault(arg.index, []).append(node)
    found = []
    for node in graph.nodes:
        second = _layer(node, model)
        source = node.args.get("input")
        norm = ""
        if second and isinstance(source, Value) and len(readers[source.index]) == 1:
            before = producers.get(source.index)
            behind = before.args.get("input") if before is not None and before.op == "batch_norm" else None
            if before is not None and isinstance(behind, Value):
                norm = before.path
                before = producers.get(behind.index) if len(readers[behind.index]) == 1 else None
            first = _layer(before, model) if before is not None else ""
            if first and first != second:
                found.append((first, norm, second))
    return found


def _layer(node: Node, model: nn.Module) -> str:
    weight = node.args.get("weight")
    if node.op in ("linear", "conv2d") and isinstance(weight, Weight):
        path = weight.name.rpartition(".")[0]
        if isinstance(model.get_submodule(path), nn.Linear | nn.Conv2d):
            return path
    return ""


def _worth(model: nn.Module, pair: tuple[str, str, str]) -> Plan | None:
    """The edits that merge a pair, if it can be and that takes fewer parameters."""
    first, norm, second = pair
    one: Any = model.get_submodule(first)
    two: Any = model.get_submodule(second)
    if unmergeable(one, two) or (norm and not isinstance(model.get_submodule(norm), BATCH_NORMS)):
        return None
    if isinstance(one, nn.Linear):
        after = one.in_features * two.out_features
    else:
        size = (one.kernel_size[0] + two.kernel_size[0] - 1) * (one.kernel_size[1] + two.kernel_size[1] - 1)
        after = one.in_channels * two.out_channels * size
    if after >= one.weight.numel() + two.weight.numel():
        return None
    fold = (Fold(norm=norm, into=first),) if norm else ()
    return Plan((*fold, Merge(first=first, second=second)))
