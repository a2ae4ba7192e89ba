"""The axes of quantization: weights x activations x gradients x errors x schemes. A method is a small file for one.

The bases for weights and activations live in ``core/``, because checkpoints and plans rebuild them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.inputs import ActivationQuantizer, quantized_input
from espalier.core.method import Method
from espalier.core.parametrize import Slot
from espalier.core.quantized import WeightQuantizer
from espalier.quantize.calibrate import Streaming

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize


@dataclass(frozen=True, kw_only=True)
class Observer(Method):
    """From values seen to the range that is covered by codes. Works on rows, so that channels are one call."""

    kind: ClassVar[str] = "observer"

    @abstractmethod
    def range(
        self, rows: Tensor, extremes: Tensor, bits: int, *, symmetric: bool, narrow: bool = True
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``(low, high)``, both (rows,), of values ``rows`` (rows, n) to be put into ``bits`` bits.

        ``extremes``: (rows, batches, 2), the smallest and largest value of each batch in the order they came; weights
        are one batch. ``symmetric``: codes lie around zero, so the range will be ``+-max(-low, high)``; ``narrow``:
        their lowest is left out, as for weights, where inputs have it.
        """

    def streaming(self) -> Streaming:
        """Watch one activation of an int8 export: ``to_int8(..., observer=Mse().streaming)``."""
        return Streaming(self)


@dataclass(frozen=True, kw_only=True)
class GradientQuantizer(Method):
    """How gradients become values of a small set: those of weights before the optimizer, or errors on the way back."""

    kind: ClassVar[str] = "gradient quantizer"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 17))

    @abstractmethod
    def quantize(self, gradient: Tensor, bits: int, generator: torch.Generator, *, samples: bool) -> Tensor:
        """``gradient`` in ``bits`` bits, its shape. ``samples``: dimension 0 counts samples, each scaled on its own."""


@dataclass(frozen=True, kw_only=True)
class LayerSolver(WeightQuantizer):
    """A weight quantizer that solves layer after layer on data, so that each is solved on what the solved ones give."""

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"train"}

    @abstractmethod
    def solve(self, model: nn.Module, slot: Slot, bits: int, axis: int | None, context: Context) -> Tensor:
        """The weight of ``slot`` on its grid: what :meth:`quantize` then leaves as it is. Earlier layers are solved."""


def computed_with(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer makes of its input ``x``: quantized where it has a quantizer, which does not follow it again."""
    quantizer = quantized_input(layer)
    if quantizer is None or not quantizer.active:
        return x
    return quantizer.method.quantize(x, replace(quantizer.view(), training=False))


def default_bits(widths: tuple[int, ...]) -> int:
    """8 where a method can do that, else the most it can."""
    return 8 if 8 in widths else max(widths)


@dataclass(frozen=True)
class Stage:
    """One training of a scheme. ``width``: no layer has fewer bits in it. ``activations``: whether they are quantized.

    ``callbacks`` are made when the stage begins, by ``callback(model, context)`` of the schemes in ``guides``.
    """

    name: str
    width: int = 1
    activations: bool = True
    guides: tuple[Any, ...] = ()

    def replace(self, **changes: Any) -> Stage:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Scheme(Method):
    """How a training for few bits is divided; schemes compose, each refines the stages of those before it."""

    kind: ClassVar[str] = "scheme"

    def stages(self, before: Sequence[Stage], method: Quantize) -> tuple[Stage, ...]:
        """The stages in place of ``before``."""
        return tuple(before)

    def callback(self, model: nn.Module, context: Context) -> Callback | None:
        """What acts in a stage that names this scheme in ``guides``."""
        return None


__all__ = ["ActivationQuantizer", "GradientQuantizer", "LayerSolver", "Observer", "Scheme", "Stage", "WeightQuantizer"]
