r"""SmoothQuant: what makes activations hard to quantize moves from them into the weights that read them.

Paper    Xiao, Lin, Seznec, Wu, Demouth, Han. SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
         Language Models. ICML 2023. arXiv:2211.10438
Formula  s_j = max|X_j|^alpha / max|W_j|^(1 - alpha);   X <- X / s, folded into what makes X;   W <- W s
Departs  All linear layers that read one tensor share one s, with the largest |W_j| over them. Scales that are not
         positive numbers are 1, so an input that is always zero stays as it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Batches, Fraction
from espalier.core.method import Technique
from espalier.core.parametrize import Slot
from espalier.core.selection import select
from espalier.graph.graph import Node, Weight
from espalier.quantize.wiring import CONVOLUTIONS, Layer, Wiring
from espalier.train.looking import batches, looking

SMALLEST = 1e-5
ELEMENTWISE = ("dropout",)
ROWS = ("reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand")
"""Operators that leave the last dimension as it is where its size stays the same."""


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s (eq. 4) from the largest magnitudes of each input channel, in the data and in the weights."""
    scale = inputs.double().pow(alpha) / weights.double().clamp_min(SMALLEST).pow(1 - alpha)
    usable = (inputs > 0) & (weights > 0) & scale.isfinite()
    return torch.where(usable, scale.clamp_min(SMALLEST), 1.0)


@dataclass(frozen=True)
class _Source:
    """A node whose weight and bias can take 1/s, and the layers that read what it gives. ``rows``: of a layer."""

    weight: Slot
    bias: Slot | None
    readers: tuple[Layer, ...]

    def divide(self, scale: Tensor) -> None:
        with torch.no_grad():
            latent = self.weight.latent
            latent.div_(scale.to(latent).reshape(-1, *[1] * (latent.ndim - 1)))
            if self.bias is not None:
                self.bias.latent.div_(scale.to(self.bias.latent))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Technique):
    """Smooth the inputs of the ``layers`` over ``batches`` of train data; ``alpha``: how much moves to the weights.

    Linear layers behind a LayerNorm, an RMS norm, a batch norm, a scale and shift, or a linear layer; convolutions
    behind a batch norm. The function of the network stays the same.
    """

    id: ClassVar[str] = "smoothquant"
    alpha: Fraction = 0.5
    batches: Batches = 8
    layers: tuple[str, ...] = ("*",)

    @property
    def needs(self) -> frozenset[str]:
        """Data, for the largest activations."""
        return frozenset({"train"})

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Find the tensors, look at them, move the scales."""
        chosen = set(select(model, self.layers, who=self.name).names)
        wiring = Wiring(model, context)
        sources = _sources(wiring, chosen, context)
        largest = _largest(model, sources, context, self.batches)
        smoothed = {}
        for source in sources:
            name = source.readers[0].slot.name
            seen = largest.get(name)
            if seen is None or len(seen) != source.readers[0].inputs:
                _skip(source.readers, "its input could not be watched", context)
                continue
            if not bool(seen.isfinite().all()):
                raise NumericError(f"the input of {name} holds NaN or infinity on the training data.")
            ranges = torch.stack([layer.input_range(layer.inputs) for layer in source.readers]).amax(0)
            scale = smoothing(seen.to(ranges.device), ranges, self.alpha)
            source.divide(scale)
            for layer in source.readers:
                layer.scale_inputs(scale)
                smoothed[layer.slot.name] = source.weight.name
        context.record.details["smoothed"] = smoothed
        return model


def _sources(wiring: Wiring, chosen: set[str], context: Context) -> list[_Source]:
    found, told = [], set()
    for number, node in enumerate(wiring.graph.nodes):
        readers, reason = _readers(wiring, number)
        linear = [layer for layer in readers if layer.slot.name in chosen]
        slots, why = _scales(wiring, node, number)
        if slots is None or not linear:
            continue
        told |= {layer.slot.name for layer in linear}
        reason = reason or why or next((layer.fixed for layer in readers if layer.slot.phase == "codes"), "")
        if not reason and len(linear) != len(readers):
            reason = "a layer that is not among the chosen ones reads the same tensor"
        if not reason and any(layer.node.op in CONVOLUTIONS for layer in readers) and node.op != "batch_norm":
            reason = f"a convolution reads what {node.op} gives"
        if reason:
            _skip(linear, reason, context)
        else:
            found.append(_Source(*slots, tuple(readers)))
    for layer in wiring.layers():
        if layer.slot.name in chosen and layer.slot.name not in told:
            context.skip(layer.slot.name, "no norm, scale or linear layer comes right before it")
    return found


def _scales(wiring: Wiring, node: Node, number: int) -> tuple[tuple[Slot, Slot | None] | None, str]:
    """Weight and bias that a node multiplies its channels with, and why they cannot take a scale; None for others."""
    if node.op in ("linear", *CONVOLUTIONS):
        layer = wiring.layer(number)
        if layer is None or node.op != "linear":
            return None, ""
        return (layer.slot, layer.bias), layer.fixed
    if node.op == "mul":
        weights = [arg for arg in node.args.values() if isinstance(arg, Weight)]
        slot = wiring.slot(weights[0]) if len(weights) == 1 else None
        width = wiring.shape(number)[-1:]
        if slot is None or tuple(slot.shape) != width:
            return None, ""
        return (slot, None), "" if slot.phase == "dense" else f"{slot.name} carries a form"
    if node.op not in ("layer_norm", "batch_norm", "scale_shift", "rms_norm"):
        return None, ""
    weight, bias = wiring.slot(node.args.get("weight")), wiring.slot(node.args.get("bias"))
    shape = wiring.shape(number)
    if weight is None or (bias is None and node.args.get("bias") is not None):
        return None, ""
    if weight.latent.ndim != 1 or (node.op in ("batch_norm", "scale_shift") and len(shape) not in (2, 3, 4, 5)):
        return None, ""
    fixed = next((slot.name for slot in (weight, bias) if slot is not None and slot.phase != "dense"), "")
    return (weight, bias), f"{fixed} carries a form" if fixed else ""


def _readers(wiring: Wiring, number: int) -> tuple[list[Layer], str]:
    """The layers that read what a node gives, and what else does; both through functions that keep the channels."""
    found, open_, reason = [], [number], ""
    while open_:
        current = open_.pop()
        value = wiring.first + current
        if value in wiring.results:
            reason = reason or "the network hands its input back"
        for reader in wiring.readers.get(value, []):
            node, layer = wiring.graph.nodes[reader], wiring.layer(reader)
            if layer is not None and wiring.source(node) == current:
                spatial = layer.node.op in CONVOLUTIONS or len(wiring.shape(current)) > 2
                first = wiring.graph.nodes[number].op in ("batch_norm", "scale_shift")
                if first and spatial and layer.node.op == "linear":
                    reason = reason or "its input has its channels elsewhere"
                found.append(layer)
            elif node.op in ELEMENTWISE or _keeps_rows(wiring, current, reader):
                open_.append(reader)
            else:
                reason = reason or f"{node.op} reads the same tensor"
    return found, reason


def _keeps_rows(wiring: Wiring, before: int, number: int) -> bool:
    """Whether a change of shape leaves the last dimension alone."""
    node, shape, now = wiring.graph.nodes[number], wiring.shape(before), wiring.shape(number)
    if node.op == "transpose":
        dims = (node.args.get("dim0"), node.args.get("dim1"))
        return all(isinstance(d, int) and d % len(shape) != len(shape) - 1 for d in dims)
    return node.op in ROWS and shape[-1:] == now[-1:] and len(shape) > 1


def _skip(layers: Any, reason: str, context: Context) -> None:
    for layer in layers:
        context.skip(layer.slot.name, reason)


def _largest(model: nn.Module, sources: list[_Source], context: Context, count: int) -> dict[str, Tensor]:
    """Weight of the first reader -> the largest magnitude of each input channel; unseen inputs are left out."""
    found: dict[str, Tensor] = {}

    def look(layer: Layer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            return
        axis = x.ndim - 1 if layer.node.op == "linear" else x.ndim - layer.slot.latent.ndim + 1
        seen = x.detach().abs().movedim(axis, 0).flatten(1).amax(1).float()
        name = layer.slot.name
        found[name] = torch.maximum(found[name], seen) if name in found else seen

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(value=False)  # it passes by the layers it is made of
        stack.callback(torch.backends.mha.set_fastpath_enabled, value=fast)
        for source in sources:
            layer = source.readers[0]
            hook = partial(look, layer)
            stack.callback(layer.slot.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if sources:
            stack.enter_context(looking(model, context, grad=False))
            for batch in batches(model, context, count, "largest activations"):
                context.data.predict(model, batch)
    return found
