"""Which weights can be split, each as a tensor of one shape, and whether plain layers can take their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.edits import Replace
from espalier.core.model import copy_model, device_of, evaluating
from espalier.core.parametrize import Slot, require_phase, slots
from espalier.core.plan import Plan, applied
from espalier.core.task import to_device
from espalier.factorize.stages import CONVS, Conv, Cost, Spec, cost, linear, nominal_size, part_of

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight. ``obstacle``: why no plain layers can take its module's place, empty where they can.

    ``size``: places along each axis of the module's input on one batch (of a Linear all dimensions between batch and
    features), None where no batch came by.
    """

    slot: Slot
    obstacle: str
    size: tuple[int, ...] | None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.slot.name

    @property
    def module(self) -> Any:
        """The module that owns it."""
        return self.slot.module

    @property
    def conv(self) -> Conv | None:
        """The module where it is a convolution that plain layers can take the place of."""
        return self.module if isinstance(self.module, CONVS) and not self.obstacle else None

    @property
    def embedding(self) -> bool:
        """Whether it is a table of rows that are looked up."""
        return isinstance(self.module, nn.Embedding) and not self.obstacle

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for all else."""
        return self.conv.groups if self.conv is not None else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel of the convolution; ``()`` for a matrix."""
        return tuple(self.conv.kernel_size) if self.conv is not None else ()

    @property
    def places(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @cached_property
    def tensor(self) -> Tensor:
        """The weight (groups, outputs of a group, inputs of a group, *kernel), at least float32; a table transposed."""
        value = self.slot.value()
        value = value if value.dtype == torch.float64 else value.float()
        if self.embedding:
            return value.T[None]
        if self.conv is None:
            return value.flatten(1)[None]
        return value.reshape(self.groups, -1, *value.shape[1:])

    @property
    def outputs(self) -> int:
        """Outputs of the layer."""
        return self.groups * self.tensor.shape[1]

    @property
    def inputs(self) -> int:
        """Inputs of the layer."""
        return self.groups * self.tensor.shape[2]

    @property
    def bias(self) -> Tensor | None:
        """Its bias, detached."""
        found = getattr(self.module, "bias", None)
        return found.detach() if isinstance(found, Tensor) else None

    def stage(
        self, inputs: int, outputs: int, axes: Sequence[int] = (), *, groups: int = 0, bias: bool = False
    ) -> Spec:
        """The spec of a layer of the row that takes this one's place; ``axes`` it works along, of a convolution.

        ``groups``: 0 for those of the layer.
        """
        if self.conv is not None:
            return part_of(self.conv, inputs, outputs, axes, groups=groups or self.groups, bias=bias)
        return linear(inputs, outputs, bias=bias)

    def lookup(self, width: int) -> Spec:
        """The spec of a narrower table."""
        args = {"num_embeddings": self.inputs, "embedding_dim": width, "padding_idx": self.module.padding_idx}
        return {"class": "Embedding", "args": args}

    def cost(self, specs: Sequence[Spec]) -> Cost:
        """What layers in its place cost."""
        size = self.size
        if size is None:
            size = nominal_size(self.conv) if self.conv is not None else ()
        return cost(specs, size)

    @cached_property
    def dense(self) -> Cost:
        """What it costs now."""
        if self.embedding:
            return Cost(self.slot.value().numel(), 0)
        axes = range(len(self.kernel))
        spec = self.stage(self.inputs, self.outputs, axes, bias=not self.obstacle and self.bias is not None)
        return self.cost((spec,))


def layers_of(model: nn.Module, selection: Iterable[Slot], context: Context, *, who: str, densify: bool) -> list[Layer]:
    """The layers of ``selection`` that can be split; all others are skipped by name.

    Raises ``PhaseError`` for a weight that an earlier step has fixed, unless ``densify``.
    """
    found: list[Layer] = []
    sizes = input_sizes(model, context)
    parents = {id(child): module for module in model.modules() for child in module.children()}
    tied = {id(owner[1]) for each in slots(model).values() if len(each.owners) > 1 for owner in each.owners}
    for slot in selection:
        if reason := unsupported(slot):
            context.skip(slot.name, reason)
            continue
        require_phase(slot, ("dense",), who, densify=densify)
        found.append(Layer(slot, obstacle(slot, parents, tied), sizes.get(slot.path)))
    return _read_by_others(model, found, context)


def unsupported(slot: Slot) -> str:
    """Why this weight is no layer that can be split; empty where it is."""
    kinds = (nn.Linear, nn.Embedding, *CONVS, nn.RNNBase, nn.MultiheadAttention)
    for _, module, attribute in slot.owners:
        if not isinstance(module, kinds) or "weight" not in attribute:
            kind = type(module).__name__.removeprefix("Parametrized")
            return f"{attribute} of a {kind} is no layer that can be split"
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            return "its table has max_norm, scale_grad_by_freq or sparse gradients, which no product of tables has"
    return ""


def obstacle(slot: Slot, parents: dict[int, nn.Module], tied: Container[int]) -> str:
    """Why no plain layers can take the place of the module; empty where they can.

    ``parents``: of modules, by id. ``tied``: ids of modules with a parameter that has other owners too.
    """
    (path, module, attribute), *others = slot.owners
    if not path:
        return "it is the whole model"
    if others:
        return f"it is used in {1 + len(others)} places ({', '.join(slot.names)})"
    if id(module) in tied:
        return "its bias has other owners too"
    if type(module) not in (nn.Linear, nn.Embedding, *CONVS) or attribute != "weight":
        return f"a {type(module).__name__} reads its weights itself"
    if isinstance(parents.get(id(module)), nn.TransformerEncoderLayer):
        return "a TransformerEncoderLayer reads its weights itself"
    if any(getattr(module, kind) for kind in HOOKS):
        return "its module has hooks, which would be lost"
    if module._modules or module._buffers or "forward" in module.__dict__:
        return "its module holds more than weights"
    if not all(parameter.requires_grad for parameter in module.parameters()):
        return "it is frozen"
    if slot.latent.dtype != torch.float32:
        return f"its weight is {str(slot.latent.dtype).removeprefix('torch.')}, and a plan builds float32 layers"
    return ""


def row_around(model: nn.Module, slot: Slot) -> str:
    """Path of the layer that an earlier step replaced by the row the weight is in; empty where there is none."""
    for edit in applied(model).edits:
        if not isinstance(edit, Replace) or edit.spec.get("class") != "Sequential":
            continue
        if slot.path.startswith(f"{edit.path}."):
            return edit.path
    return ""


def input_sizes(model: nn.Module, context: Context) -> dict[str, tuple[int, ...]]:
    """Module path -> places along each axis of what it reads in the task's example; empty without a task."""
    found: dict[str, tuple[int, ...]] = {}
    if context.task is None:
        return found

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return
        if isinstance(module, nn.Linear):
            found.setdefault(path, tuple(x.shape[1:-1]))
        elif isinstance(module, CONVS):
            found.setdefault(path, tuple(x.shape[-len(module.kernel_size) :]))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, *CONVS)):
                hook: Callable[..., None] = partial(note, path)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run_example(model, context)
    return found


def run_example(model: nn.Module, context: Context) -> None:
    """The model on the task's example."""
    with context.forked("example"), evaluating(model):
        context.data.predict(model, to_device(context.data.example(), device_of(model)))


def _read_by_others(model: nn.Module, layers: list[Layer], context: Context) -> list[Layer]:
    """The layers, with an obstacle at those whose attributes other code reads: the model fails without them."""
    free = [layer for layer in layers if not layer.obstacle]
    if context.task is None or _runs_without(model, free, context):
        return layers
    read = {layer.name for layer in free if not _runs_without(model, [layer], context)}
    why = "other code of the model reads the weights of its module"
    return [Layer(layer.slot, why, layer.size) if layer.name in read else layer for layer in layers]


def _runs_without(model: nn.Module, layers: Sequence[Layer], context: Context) -> bool:
    """Whether the model runs with a row of layers in the place of each of ``layers``."""
    edits = []
    for layer in layers:
        axes = range(len(layer.kernel))
        first = layer.lookup(1) if layer.embedding else layer.stage(layer.inputs, layer.groups, axes)
        second = layer.stage(layer.groups, layer.outputs)
        edits.append(Replace(path=layer.slot.path, spec={"class": "Sequential", "children": [first, second]}))
    with context.forked("row"):
        trial = Plan(tuple(edits)).apply(copy_model(model)).to(device_of(model))
        try:
            run_example(trial, context)
        except Exception:
            return False
    return True
