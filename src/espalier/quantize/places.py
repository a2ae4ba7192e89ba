"""Which weights and inputs a quantization step works on, in how many bits, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.core.context import Context
from espalier.core.errors import NumericError, PhaseError
from espalier.core.forms import Form
from espalier.core.parametrize import Slot, bake, slots
from espalier.core.quantized import QuantizedWeight
from espalier.core.selection import Selection, by_pattern, select, weights

LAYERS = (nn.Linear, _ConvNd, nn.RNNBase, nn.Bilinear)
Asked = int | Mapping[str, int] | None
"""Bits for all, or pattern -> bits."""


@dataclass(frozen=True)
class Place:
    """A weight to quantize. ``bits``; ``end``: whether it is the first or the last layer's.

    ``input_bits``: asked for what goes into its layer.
    """

    slot: Slot
    bits: int | None
    end: bool
    input_bits: int | None = None


def output_axis(slot: Slot) -> int:
    """The dimension of the output channels: 1 for transposed convolutions without groups, else 0."""
    module = slot.module
    return 1 if isinstance(module, _ConvTransposeNd) and module.groups == 1 else 0


def ends(model: nn.Module) -> set[str]:
    """Names of the weights of the first and the last layer, by the model's order; embeddings are no layers.

    A tied weight has the places of all its owners; a recurrent layer's weights belong together.
    """
    order = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    layers = [
        ((order[path], _within(module, attribute, place)), slot.name)
        for place, slot in enumerate(weights(model))
        for path, module, attribute in slot.owners
        if not isinstance(module, nn.Embedding)
    ]
    outer = {min(layers)[0], max(layers)[0]} if layers else set()
    return {name for layer, name in layers if layer in outer}


def _within(module: nn.Module, attribute: str, place: int) -> int:
    """Where a weight stands among those of its module: with all of its layer in recurrent ones, else by itself."""
    if isinstance(module, nn.RNNBase):
        return int(attribute.partition("_l")[2].removesuffix("_reverse"))
    return place


def chosen(
    model: nn.Module, patterns: tuple[str, ...], bits: Asked, context: Context, who: str,
    *, densify: bool, input_bits: Asked = None, stay: bool = False,
) -> list[Place]:  # fmt: skip
    """The weights that answer to ``patterns``, those that cannot be quantized skipped with the reason.

    Raises ``PhaseError`` for weights that an earlier step has quantized (with ``densify`` they are quantized anew),
    unless all weights ``stay`` as they are; ``NumericError`` for NaN or infinity.
    """
    selection = select(model, patterns, who=who)
    widths, of_inputs = (_by_name(model, selection, asked, who) for asked in (bits, input_bits))
    at_end, found = ends(model), []
    for slot in selection:
        if isinstance(slot.form, Form) and slot.phase == "codes" and not slot.form.flat and not stay:
            if not densify:
                raise PhaseError(
                    f"{who} would change {slot.name}, whose weights are on a grid already "
                    f"({_said(slot.form)}). Leave the layer out, or pass densify=true to quantize it anew."
                )
            bake(slot)
        if not bool(slot.value().isfinite().all()):
            raise NumericError(f"{slot.name} holds NaN or infinity; {who} cannot quantize it.")
        if not slot.latent.numel():
            context.skip(slot.name, "it is empty")
            continue
        found.append(Place(slot, widths[slot.name], slot.name in at_end, of_inputs[slot.name]))
    for name, slot in slots(model).items():
        if name not in selection.names and slot.latent.ndim >= 2:
            context.skip(name, "not among the chosen layers")
    return found


def _by_name(model: nn.Module, selection: Selection, asked: Asked, who: str) -> dict[str, int | None]:
    if isinstance(asked, Mapping):
        return by_pattern(model, selection, asked, None, who=who)
    return dict.fromkeys(selection.names, asked)


def _said(form: Form) -> str:
    return f"{form.method.name}, {form.bits} bits" if isinstance(form, QuantizedWeight) else form.kind


def input_layers(places: list[Place], context: Context) -> dict[str, tuple[nn.Module, Place]]:
    """Path -> the layer whose input can be quantized, and the weight of it that was chosen first."""
    found: dict[str, tuple[nn.Module, Place]] = {}
    seen: set[int] = set()
    for place in places:
        for path, module, _ in place.slot.owners:
            if id(module) in seen:
                continue
            seen.add(id(module))
            if isinstance(module, LAYERS) and path and not isinstance(module, nn.Bilinear):
                found[path] = module, place
            else:
                reason = (
                    "its inputs are no numbers" if isinstance(module, nn.Embedding)
                    else "its input does not pass a layer's own forward"
                )  # fmt: skip
                context.skip(f"input of {path or 'the model'}", reason)
    return found
