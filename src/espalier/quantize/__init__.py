"""Quantization: weights x activations x gradients x errors x schemes."""

from espalier.core.inputs import ActivationQuantizer
from espalier.core.quantized import WeightQuantizer
from espalier.core.registry import register
from espalier.quantize.affine import Affine, AffineInput
from espalier.quantize.minmax import MinMax
from espalier.quantize.parts import GradientQuantizer, LayerSolver, Observer, Scheme
from espalier.quantize.quantize import Quantize

METHODS = register("quantize", (Quantize, Affine, AffineInput, MinMax))

__all__ = [
    "ActivationQuantizer",
    "Affine",
    "AffineInput",
    "GradientQuantizer",
    "LayerSolver",
    "MinMax",
    "Observer",
    "Quantize",
    "Scheme",
    "WeightQuantizer",
]
