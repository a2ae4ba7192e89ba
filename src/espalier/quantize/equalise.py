r"""Cross-layer equalisation: channels of neighbouring layers are rescaled so that both use their range alike.

Paper    Nagel, van Baalen, Blankevoort, Welling. Data-Free Quantization Through Weight Equalization and Bias
         Correction. ICCV 2019. arXiv:1906.04721
Formula  s_i = sqrt(r1_i r2_i) / r2_i;   W1 <- S^-1 W1, b1 <- S^-1 b1, W2 <- W2 S;   r the largest |w| of a channel, out
         of the first layer and into the second, until nothing changes;   then c = max(0, beta - 3 gamma) moves on:
         b1 <- b1 - c, b2 <- b2 + W2 c
Departs  Batch norms are folded first, by the step itself. Pooling and flattening may lie between the two layers. Biases
         move only where a batch norm has told beta and gamma, and not into a layer that pads with zeros, where the
         border would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.edits import Replace
from espalier.core.fields import Steps, Tolerance
from espalier.core.method import Technique
from espalier.core.plan import Plan
from espalier.quantize.wiring import Layer, Wiring, moments

SHIFTED = ("relu", "leaky_relu", "prelu", "dropout", "flatten", "reshape", "squeeze", "mean")
"""Between two layers: f(x + c) = f(x) + c for x, c > 0, as for pools that pad nothing."""


def equalising(first: Tensor, second: Tensor) -> Tensor:
    """s (eq. 11) from the ranges of the channels; 1 where one of them is zero."""
    scale = torch.sqrt(first.double() * second.double()) / second.double()
    return torch.where((first > 0) & (second > 0), scale, 1.0)


def clipped(wiring: Wiring) -> list[Replace]:
    """Edits that put a ReLU in the place of each ReLU6 that keeps two layers from being rescaled."""
    found = {}
    for layer in wiring.layers():
        pair = wiring.after(layer, clipped=True)
        for number in pair[0] if pair is not None else ():
            path = wiring.graph.nodes[number].path
            if wiring.is_relu6(number) and path and isinstance(wiring.model.get_submodule(path), nn.Hardtanh):
                found[path] = Replace(path=path, spec={"class": "ReLU", "args": {}})
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Equalise(Technique):
    """Rescale all pairs in turn, ``rounds`` times at most, until no s is further from 1 than ``tolerance``.

    ``relu6``: a ReLU6 between two layers becomes a ReLU first. ``absorb``: large biases move into the next layer.
    """

    id: ClassVar[str] = "equalise"
    rounds: Steps = 100
    tolerance: Tolerance = 1e-3
    relu6: bool = True
    absorb: bool = True

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Fold, rescale, absorb."""
        wiring = Wiring(model, context)
        folds = wiring.folds()
        known = {fold.into: moments(model.get_submodule(fold.norm)) for fold in folds}
        if folds:
            model = Plan(tuple(folds)).apply(model)
            wiring = Wiring(model, context)
        replaced = clipped(wiring) if self.relu6 else []
        if replaced:
            model = Plan(tuple(replaced)).apply(model)
            wiring = Wiring(model, context)
            context.note(f"ReLU in the place of ReLU6 at {', '.join(edit.path for edit in replaced)}.")
        pairs = self._pairs(wiring, context)
        total = self._equalise(pairs, context)
        if self.absorb:
            for first, between, second in pairs:
                factor = total.get(first.path)
                if first.path in known and factor is not None:
                    beta, gamma = (value.double() * factor for value in known[first.path])
                    absorb(wiring, first, between, second, beta, gamma)
        context.record.details["folded"] = [fold.norm for fold in folds]
        context.record.details["pairs"] = [[first.path, second.path] for first, _, second in pairs]
        return model

    @staticmethod
    def _pairs(wiring: Wiring, context: Context) -> list[tuple[Layer, list[int], Layer]]:
        found = []
        for first in wiring.layers():
            pair = wiring.after(first)
            if pair is None:
                context.skip(first.slot.name, "no layer alone reads its output through functions with f(s x) = s f(x)")
                continue
            between, second = pair
            fixed = first.fixed or (second.fixed if second.slot.phase == "codes" else "")
            if fixed:
                context.skip(first.slot.name, fixed)
            else:
                found.append((first, between, second))
        return found

    def _equalise(self, pairs: list[tuple[Layer, list[int], Layer]], context: Context) -> dict[str, Tensor]:
        """Path of the first layer of each pair -> what its outputs were multiplied with."""
        total: dict[str, Tensor] = {}
        for number in range(self.rounds if pairs else 0):
            furthest = 0.0
            for first, _, second in pairs:
                scale = equalising(first.output_range(), second.input_range(first.slot.shape[0]))
                first.scale_outputs(1 / scale)
                second.scale_inputs(scale)
                total[first.path] = total.get(first.path, torch.ones_like(scale)) / scale
                furthest = max(furthest, float((scale - 1).abs().max()))
            context.progress("equalisation", number + 1, self.rounds, furthest=furthest)
            if furthest <= self.tolerance:
                break
        return total


def absorb(
    wiring: Wiring, first: Layer, between: list[int], second: Layer, beta: Tensor, gamma: Tensor
) -> Tensor | None:  # fmt: skip
    """Move c = max(0, beta - 3 gamma) from the bias of ``first`` on to that of ``second``; None where it cannot go."""
    if first.bias is None or second.bias is None or not between or first.bias.phase != "dense":
        return None
    if second.bias.phase != "dense" or pads(wiring.model.get_submodule(second.path)):
        return None
    ops = [wiring.graph.nodes[number].op for number in between]
    if not all(op in SHIFTED or op.startswith(("max_pool", "adaptive_")) for op in ops):
        return None
    amount = (beta - 3 * gamma).clamp_min(0)
    each = second.by_input(second.slot.value().double(), len(amount)).flatten(3).sum(3)
    moved = (each * amount.reshape(second.groups, 1, -1)).sum(2).reshape(-1)
    with torch.no_grad():
        first.bias.latent.sub_(amount.to(first.bias.latent))
        second.bias.latent.add_(moved.to(second.bias.latent))
    return amount


def pads(layer: nn.Module) -> bool:
    """Whether a convolution puts zeros around its input."""
    padding = getattr(layer, "padding", 0)
    sizes = getattr(layer, "kernel_size", (1,))
    if padding == "same":
        return any(size > 1 for size in sizes)
    return padding != "valid" and any(padding if isinstance(padding, tuple) else (padding,))
