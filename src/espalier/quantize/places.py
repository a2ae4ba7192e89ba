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
from espalier.core.selection import by_pattern, select, weights

LAYERS = (nn.Linear, _ConvNd, nn.RNNBase, nn.Bilinear)


@dataclass(frozen=True)
class Place:
    """A weight to quantize. ``bits``; ``end``: whether it is the first or the last layer's."""

    slot: Slot
    bits: int | None
    end: bool


def output_axis(slot: Slot) -> int:
    """The dimension of the output channels: 1 for transposed convolutions without groups, else 0."""
    module = slot.module
    return 1 if isinstance(module, _ConvTransposeNd) and module.groups == 1 else 0


def ends(model: nn.Module) -> set[str]:
    """Names of the weights of the first and the last layer, by the model's order; embeddings are no layers."""
    names = [slot.name for slot in weights(model) if not isinstance(slot.module, nn.Embedding)]
    return {names[0], names[-1]} if names else set()


def chosen(
    model: nn.Module, patterns: tuple[str, ...], bits: int | Mapping[str, int] | None, context: Context, who: str,
    *, densify: bool,
) -> list[Place]:  # fmt: skip
    """The weights that answer to ``patterns``, those that cannot be quantized skipped with the reason.

    Raises ``PhaseError`` for weights that an earlier step has quantized (with ``densify`` they are quantized anew),
    ``NumericError`` for NaN or infinity.
    """
    selection = select(model, patterns, who=who)
    table = by_pattern(model, selection, bits, None, who=who) if isinstance(bits, Mapping) else {}
    at_end, found = ends(model), []
    for slot in selection:
        if isinstance(slot.form, Form) and slot.phase == "codes" and not slot.form.flat:
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
        wanted = table.get(slot.name) if isinstance(bits, Mapping) else bits
        found.append(Place(slot, wanted, slot.name in at_end))
    for name, slot in slots(model).items():
        if name not in selection.names and slot.latent.ndim >= 2:
            context.skip(name, "not among the chosen layers")
    return found


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
