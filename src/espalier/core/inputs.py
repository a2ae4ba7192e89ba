"""Quantized inputs of layers: what a method supplies, the module that carries it, and the plan's edit that puts it in.

An activation quantizer is structure: it computes, it is traced into the graph, and whoever takes the weights alone
replays it. It sits as ``input_quantizer`` below the layer whose input it quantizes, and the layer's own ``forward``
runs through it.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from espalier.core.callback import Loop
from espalier.core.edits import Edit, module_at
from espalier.core.errors import Corrupt, EspalierError, ModelError
from espalier.core.method import Method
from espalier.core.plan import register_edit
from espalier.core.quantized import State, method_of

NAME = "input_quantizer"


@dataclass(frozen=True)
class Observed:
    """What calibration saw of one input. ``sample``: a random part of the values, 1-D, at most 2**18 of them.

    ``extremes``: (batches, 2), the smallest and the largest value of each batch in the order they came.
    """

    sample: Tensor
    extremes: Tensor

    @property
    def low(self) -> float:
        """The smallest value of all."""
        return float(self.extremes[:, 0].min())

    @property
    def high(self) -> float:
        """The largest value of all."""
        return float(self.extremes[:, 1].max())

    @classmethod
    def nothing(cls) -> Observed:
        """What stands in where only the shapes of a state are asked for."""
        return cls(torch.linspace(0, 1, 16), torch.tensor([[0.0, 1.0]]))


@dataclass(frozen=True)
class Input:
    """One input as a quantizer sees it. ``signed``: calibration saw values below zero."""

    bits: int
    signed: bool
    state: State
    training: bool

    @property
    def middle(self) -> int:
        """The code of zero on a grid of 0..2^b-1 that lies around it: 2^(b-1) with a sign, else 0."""
        return 2 ** (self.bits - 1) if self.signed else 0


@dataclass(frozen=True, kw_only=True)
class ActivationQuantizer(Method):
    """How the input of a layer becomes values of a small set. ``widths``: the bits it can do.

    ``at_ends``: whether it is fit for the first and the last layer of a network in which these have bits of their own.
    In eval mode only operators of the graph's table may run, with the state as tensors.
    """

    kind: ClassVar[str] = "activation quantizer"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 17))
    at_ends: ClassVar[bool] = True

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        """The state to begin with: ``nn.Parameter`` for what is learned. Shapes depend on ``bits`` alone."""
        return {}

    def refuses(self, layer: nn.Module, observed: Observed) -> str | None:
        """Why the input of this layer cannot be quantized so; None where it can."""
        return None

    @abstractmethod
    def quantize(self, x: Tensor, a: Input) -> Tensor:
        """``x`` on its levels, differentiable by the method's backward rule."""

    def run(self, layer: nn.Module, forward: Callable[..., Any], x: Tensor, a: Input) -> Any:
        """``forward`` of the ``layer`` on the quantized input; methods that also change the output do it here."""
        return forward(self.quantize(x, a))

    # --- while it trains; empty by default ----------------------------------------------------------------------

    def penalty(self, a: Input) -> Tensor | None:
        """A term of the loss, or None."""
        return None

    def after_step(self, a: Input, loop: Loop) -> None:
        """The optimizer has stepped."""


class QuantizedInput(nn.Module):
    """Carries an activation quantizer and its state below a layer. ``active``: whether it does anything just now."""

    def __init__(self, method: ActivationQuantizer, bits: int, observed: Observed, *, signed: bool) -> None:
        super().__init__()
        self.method, self.bits, self.signed, self.active = method, bits, signed, True
        self.state = State(method.start(observed, bits, signed=signed))

    def view(self) -> Input:
        """The input as the method sees it."""
        return Input(self.bits, self.signed, self.state, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` quantized."""
        return self.method.quantize(x, self.view())

    def extra_repr(self) -> str:
        return f"{self.method.name}, {self.bits} bits{', signed' if self.signed else ''}"


def quantized_input(layer: nn.Module) -> QuantizedInput | None:
    """The quantizer of the layer's input, if it has one."""
    found = layer._modules.get(NAME)
    return found if isinstance(found, QuantizedInput) else None


def quantized_inputs(model: nn.Module) -> dict[str, QuantizedInput]:
    """Path of the layer -> the quantizer of its input, each once."""
    found: dict[int, tuple[str, QuantizedInput]] = {}
    for path, module in model.named_modules():
        quantizer = quantized_input(module)
        if quantizer is not None:
            found.setdefault(id(quantizer), (path, quantizer))
    return dict(found.values())


def _run(layer: nn.Module, x: Any, *rest: Any, **named: Any) -> Any:
    """In the place of the layer's ``forward``: its first argument goes through the quantizer."""
    quantizer = quantized_input(layer)
    forward = partial(type(layer).forward, layer)
    if quantizer is None or not quantizer.active:
        return forward(x, *rest, **named)
    if isinstance(x, PackedSequence):
        return forward(x._replace(data=quantizer(x.data)), *rest, **named)
    if not x.is_floating_point():
        return forward(x, *rest, **named)
    return quantizer.method.run(layer, lambda value: forward(value, *rest, **named), x, quantizer.view())


def _seen(_: nn.Module, __: Any) -> None:
    """A hook that does nothing: without one, torch's fused transformer layers call no sublayer's ``forward``."""


def put_quantizer(layer: nn.Module, quantizer: QuantizedInput | None) -> None:
    """Let the layer's input go through ``quantizer``; None takes the one there is away."""
    if quantizer is None:
        layer._modules.pop(NAME, None)
        vars(layer).pop("forward", None)
        for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _seen]:
            del layer._forward_pre_hooks[key]
        return
    if "forward" in vars(layer) and quantized_input(layer) is None:
        raise ModelError(
            f"{type(layer).__name__} has had its forward replaced on the object; its input cannot be quantized. Put "
            "that code into the class."
        )
    layer.add_module(NAME, quantizer.train(layer.training))
    vars(layer)["forward"] = partial(_run, layer)
    if _seen not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_seen)


@register_edit
@dataclass(frozen=True, kw_only=True)
class QuantizeInput(Edit):
    """Quantize the input of the layer at ``path``. ``method``: JSON of the quantizer's name and fields."""

    kind: ClassVar[str] = "quantize-input"
    path: str
    method: str
    bits: int
    signed: bool

    @classmethod
    def of(cls, path: str, method: ActivationQuantizer, bits: int, *, signed: bool) -> QuantizeInput:
        """The edit that puts ``method`` before the layer."""
        from espalier.core.recipe import fields_to_data

        data = {"name": method.name, "fields": fields_to_data(method)}
        return cls(path=path, method=json.dumps(data, sort_keys=True), bits=bits, signed=signed)

    def apply(self, model: nn.Module) -> None:
        """Put a quantizer in, its state still to be filled."""
        try:
            data = json.loads(self.method)
            assert isinstance(data, Mapping)  # noqa: S101 - told as Corrupt below
            method = method_of(ActivationQuantizer, data)
            if type(self.bits) is not int or self.bits not in method.widths or type(self.signed) is not bool:
                raise Corrupt(f"a plan gives the input of {self.path!r} {self.bits!r} bits by {method.name}.")
        except EspalierError:
            raise
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise Corrupt(f"a plan holds an input quantizer that cannot be read: {error!r}") from error
        layer = module_at(model, self.path)
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        quantizer = QuantizedInput(method, self.bits, Observed.nothing(), signed=self.signed)
        put_quantizer(layer, quantizer.to(device))

    def summary(self) -> str:
        return f"{self.path}: input in {self.bits} bits by {json.loads(self.method)['name']}"


@register_edit
@dataclass(frozen=True, kw_only=True)
class FloatInput(Edit):
    """Take the quantizer of the input of the layer at ``path`` away."""

    kind: ClassVar[str] = "float-input"
    path: str

    def apply(self, model: nn.Module) -> None:
        put_quantizer(module_at(model, self.path), None)
