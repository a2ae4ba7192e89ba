r"""Bias correction: the mean error that rounded weights bring is taken out of each layer's bias.

Paper    Nagel, van Baalen, Blankevoort, Welling. Data-Free Quantization Through Weight Equalization and Bias
         Correction. ICCV 2019. arXiv:1906.04721 (section 4.2)
Formula  b <- b - (W^ - W) E[x];   E[x] measured, layer after layer;   or from the batch norm before a ReLU, clipped
         normal: E[x] = gamma phi(-beta / gamma) + beta (1 - Phi(-beta / gamma))
Departs  E[x] is measured at the input of the layer in the corrected network, patch by patch, so that padding counts.
         A layer without a bias has its correction in the mean of the batch norm that follows; else it is left alone.
         So are weights with which the model has been trained since they were quantized: its biases fit them.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.method import Technique
from espalier.core.parametrize import Slot, slots
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.quantize.gptq import MATRICES
from espalier.quantize.parts import LayerSolver
from espalier.quantize.wiring import Layer, Wiring, moments
from espalier.train.layers import as_matrix, columns, in_order, owners
from espalier.train.looking import batches, looking
from espalier.train.quantizers import quantized

TRANSPARENT = ("dropout", "flatten", "fake_quantize")
"""Between a norm and a layer: what leaves the mean of a channel as it is, or nearly so."""


def clipped_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """E[clip(x, low, high)] of a normal x, elementwise (float64); eq. 19 for a ReLU."""
    mean, deviation = mean.double(), deviation.double().clamp_min(1e-12)

    def below(limit: float) -> tuple[Tensor, Tensor]:
        """Phi and phi at the limit."""
        z = (limit - mean) / deviation
        return torch.special.ndtr(z), torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)

    at_low, density = below(low)
    found = low * at_low + mean * (1 - at_low) + deviation * density
    if math.isinf(high):
        return found
    at_high, end = below(high)
    return found + high * (1 - at_high) - mean * (1 - at_high) - deviation * end


@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Technique):
    """Correct the bias of every quantized Linear, Conv1d and Conv2d.

    ``by``: ``data`` measures E[x] on ``batches`` of train data, ``norms`` takes it from batch norms, ``auto`` is data
    where the task has some.
    """

    id: ClassVar[str] = "bias-correction"
    by: Literal["auto", "data", "norms"] = "auto"
    batches: Batches = 8

    @property
    def needs(self) -> frozenset[str]:
        """Data, where that was asked for."""
        return frozenset({"train"}) if self.by == "data" else frozenset()

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Correct layer after layer."""
        measured = self.by == "data" or (self.by == "auto" and context.data.has("train"))
        found = [slot for slot, form in quantized(model) if _solvable(slot, form, context)]
        if not found:
            return model
        wiring = Wiring(model, context)
        layers = {layer.slot.name: layer for layer in wiring.layers()}
        ordered = in_order(model, found, context) if measured else tuple(found)
        corrected = {}
        for number, slot in enumerate(ordered):
            context.progress("bias correction", number, len(ordered))
            error, layer = rounding_error(slot, context), layers.get(slot.name)
            if error is None:
                context.skip(slot.name, "its float weights are not known any more")
                continue
            takes = _taker(wiring, slot, layer)
            if takes is None:
                context.skip(slot.name, "it has no bias, and no batch norm follows that could take the correction")
                continue
            mean = patch_mean(model, slot, context, self.batches) if measured else _expected(wiring, layer)
            if mean is None:
                reason = "the model does not call its layer" if measured else "no batch norm tells its mean input"
                context.skip(slot.name, reason)
                continue
            shift = mean_error(error, mean, _groups(slot))
            with torch.no_grad():
                takes.sub_(shift.to(takes)) if isinstance(takes, nn.Parameter) else takes.add_(shift.to(takes))
            corrected[slot.name] = float(shift.abs().max())
        context.record.details["corrected"] = corrected
        return model


def mean_error(error: Tensor, mean: Tensor, groups: int) -> Tensor:
    """(W^ - W) E[x], (outputs,): ``error`` has the weight's shape, ``mean`` is (groups, kernel * inputs)."""
    parts = as_matrix(error.double()).chunk(groups)
    return torch.cat([part @ row for part, row in zip(parts, mean.double(), strict=True)])


def rounding_error(slot: Slot, context: Context) -> Tensor | None:
    """W^ - W; None where the weight the quantized one came from is neither its latent tensor nor in the original."""
    form = slot.form
    assert isinstance(form, QuantizedWeight)  # noqa: S101 - the caller chose it so
    value, latent = slot.value(), slot.latent.detach()
    own = type(form.method).latent is WeightQuantizer.latent and not isinstance(form.method, LayerSolver)
    if own and latent.shape == value.shape:
        return value - (latent if form.kept is None else torch.where(form.kept, latent, 0))
    original = context.models.get("original")
    found = slots(original).get(slot.name) if original is not None else None
    if found is None or found.shape != value.shape:
        return None
    weight = found.value().to(value)
    return value - (weight if form.kept is None else torch.where(form.kept, weight, 0))


def patch_mean(model: nn.Module, slot: Slot, context: Context, count: int) -> Tensor | None:
    """E[x] over ``count`` training batches, (groups, kernel * inputs), float64; None where the layer is not called."""
    sums: list[Tensor] = []
    seen = 0

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        x = (args[0] if args else kwargs["input"]).double()
        count = 1
        if not isinstance(module, nn.Linear) and x.ndim == slot.latent.ndim:
            count, x = len(x), x.mean(0, keepdim=True)  # patches of the mean are means of the patches
        for group, rows in enumerate(columns(module, x)):
            total = rows.sum(0) * count
            if group == len(sums):
                sums.append(torch.zeros_like(total))
            sums[group] += total
        seen += len(rows) * count

    with ExitStack() as stack:
        for module in owners(slot):
            stack.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, count, f"inputs of {slot.name}"):
            context.data.predict(model, batch)
    return torch.stack(sums) / seen if seen else None


def _solvable(slot: Slot, form: QuantizedWeight, context: Context) -> bool:
    if not all(isinstance(layer, MATRICES) for layer in owners(slot)) or slot.owners[0][2] != "weight":
        context.skip(slot.name, f"it is no Linear, Conv1d or Conv2d but a {type(slot.module).__name__}")
        return False
    if form.trained:
        context.skip(slot.name, "the model has been trained since it was quantized, so the bias fits its codes already")
        return False
    return True


def _groups(slot: Slot) -> int:
    return slot.module.groups if isinstance(slot.module, (nn.Conv1d, nn.Conv2d)) else 1


def _taker(wiring: Wiring, slot: Slot, layer: Layer | None) -> Tensor | None:
    """The bias, or the running mean of the batch norm that follows."""
    layers = owners(slot)
    bias = wiring.known.get(f"{slot.path}.bias" if slot.path else "bias")
    if bias is not None:
        alone = bias.phase == "dense" and len(owners(bias)) == len(layers) == 1
        return bias.latent if alone else None
    number = wiring.reader(layer.number) if layer is not None else None
    norm = wiring.norm(number) if number is not None else None
    mean = norm[1].running_mean if norm is not None else None
    return mean if isinstance(mean, Tensor) and len(mean) == slot.shape[0] else None


def _expected(wiring: Wiring, layer: Layer | None) -> Tensor | None:
    """E[x] from the batch norm that feeds the layer, directly or through a ReLU; padding is left out of account."""
    if layer is None:
        return None
    low, high, place = -math.inf, math.inf, wiring.source(layer.node)
    while place is not None:
        node, norm = wiring.graph.nodes[place], wiring.norm(place)
        if norm is not None:
            beta, gamma = moments(norm[1])
            channels = beta.double() if math.isinf(low) else clipped_mean(beta, gamma, low, high)
            if layer.inputs % len(channels):
                return None
            positions = layer.inputs // len(channels) if layer.slot.latent.ndim == 2 else 1
            kernel = int(torch.Size(layer.slot.shape[2:]).numel())
            parts = channels.repeat_interleave(positions).reshape(layer.groups, 1, -1)
            return parts.expand(-1, kernel, -1).flatten(1)
        if node.op == "relu" and math.isinf(low):
            low = 0.0
        elif wiring.is_relu6(place) and math.isinf(low):
            low, high = 0.0, 6.0
        elif node.op not in TRANSPARENT and not node.op.startswith(("avg_pool", "adaptive_avg_pool")):
            return None
        place = wiring.source(node)
    return None
