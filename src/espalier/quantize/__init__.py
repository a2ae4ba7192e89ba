"""Quantization: weights x activations x gradients x errors x schemes."""

from espalier.core.inputs import ActivationQuantizer
from espalier.core.quantized import WeightQuantizer
from espalier.core.registry import register
from espalier.quantize.adaround import AdaRound
from espalier.quantize.admm import Admm
from espalier.quantize.affine import Affine, AffineInput
from espalier.quantize.apot import APoT, APoTInput
from espalier.quantize.bias_correction import BiasCorrection
from espalier.quantize.binary import Binary
from espalier.quantize.binary_input import BinaryInput
from espalier.quantize.binary_stochastic import BinaryStochastic
from espalier.quantize.bs_fixed import BSFixed
from espalier.quantize.bwn import BWN
from espalier.quantize.dorefa import DoReFa, DoReFaInput
from espalier.quantize.elq import Elq
from espalier.quantize.ema import Ema
from espalier.quantize.entropy import Entropy
from espalier.quantize.equalise import Equalise
from espalier.quantize.error_quantization import ErrorQuantization
from espalier.quantize.fixed_point import FixedPoint, FixedPointInput
from espalier.quantize.gptq import GPTQ
from espalier.quantize.gradient_quantization import GradientQuantization
from espalier.quantize.guided import Guided
from espalier.quantize.half import Half, HalfInput
from espalier.quantize.hwgq import HWGQ
from espalier.quantize.inq import Inq
from espalier.quantize.lab import LAB
from espalier.quantize.laq import LAQ
from espalier.quantize.lat import LAT
from espalier.quantize.levels import Levels
from espalier.quantize.log import Log, LogInput
from espalier.quantize.lq_net import LQNet, LQNetInput
from espalier.quantize.lr_net import LrNet
from espalier.quantize.lsq import LSQ, LSQInput
from espalier.quantize.minmax import MinMax
from espalier.quantize.mixed_bits import MixedBits
from espalier.quantize.mse import Mse
from espalier.quantize.pact import PACT
from espalier.quantize.parts import GradientQuantizer, LayerSolver, Observer, Scheme
from espalier.quantize.percentile import Percentile
from espalier.quantize.power_of_two import PowerOfTwo
from espalier.quantize.progressive import Progressive
from espalier.quantize.ptq_int8 import PTQInt8
from espalier.quantize.qat import QAT, QATInput
from espalier.quantize.quantile import Quantile
from espalier.quantize.quantize import Quantize
from espalier.quantize.relaxed import Relaxed, RelaxedInput
from espalier.quantize.sawb import SAWB
from espalier.quantize.smoothquant import SmoothQuant
from espalier.quantize.ternary import Ternary
from espalier.quantize.ternary_bernoulli import TernaryBernoulli
from espalier.quantize.ttq import TTQ
from espalier.quantize.twn import TWN
from espalier.quantize.two_stage import TwoStage
from espalier.quantize.value_aware import ValueAware, ValueAwareInput
from espalier.quantize.value_aware_memory import ValueAwareMemory
from espalier.quantize.xnor import XNORInput

METHODS = register(
    "quantize",
    (
        *(Quantize, Affine, AffineInput, FixedPoint, FixedPointInput, Half, HalfInput),
        *(MinMax, Ema, Percentile, Mse, Entropy),
        *(QAT, QATInput, LSQ, LSQInput, SAWB, PACT, DoReFa, DoReFaInput, Relaxed, RelaxedInput),
        *(PowerOfTwo, Log, LogInput, APoT, APoTInput, LQNet, LQNetInput, Quantile, Levels),
        *(Binary, BinaryInput, BinaryStochastic, BWN, XNORInput, BSFixed, HWGQ),
        *(Ternary, TernaryBernoulli, TWN, TTQ, LAB, LAT, LAQ),
        *(GPTQ, AdaRound, PTQInt8, SmoothQuant, Equalise, BiasCorrection, MixedBits),
        *(GradientQuantization, ErrorQuantization, TwoStage, Progressive, Guided),
        *(Inq, Admm, Elq, LrNet, ValueAware, ValueAwareInput, ValueAwareMemory),
    ),
)  # fmt: skip

__all__ = [
    "BWN",
    "GPTQ",
    "HWGQ",
    "LAB",
    "LAQ",
    "LAT",
    "LSQ",
    "PACT",
    "QAT",
    "SAWB",
    "TTQ",
    "TWN",
    "APoT",
    "APoTInput",
    "ActivationQuantizer",
    "AdaRound",
    "Admm",
    "Affine",
    "AffineInput",
    "BSFixed",
    "BiasCorrection",
    "Binary",
    "BinaryInput",
    "BinaryStochastic",
    "DoReFa",
    "DoReFaInput",
    "Elq",
    "Ema",
    "Entropy",
    "Equalise",
    "ErrorQuantization",
    "FixedPoint",
    "FixedPointInput",
    "GradientQuantization",
    "GradientQuantizer",
    "Guided",
    "Half",
    "HalfInput",
    "Inq",
    "LQNet",
    "LQNetInput",
    "LSQInput",
    "LayerSolver",
    "Levels",
    "Log",
    "LogInput",
    "LrNet",
    "MinMax",
    "MixedBits",
    "Mse",
    "Observer",
    "PTQInt8",
    "Percentile",
    "PowerOfTwo",
    "Progressive",
    "QATInput",
    "Quantile",
    "Quantize",
    "Relaxed",
    "RelaxedInput",
    "Scheme",
    "SmoothQuant",
    "Ternary",
    "TernaryBernoulli",
    "TwoStage",
    "ValueAware",
    "ValueAwareInput",
    "ValueAwareMemory",
    "WeightQuantizer",
    "XNORInput",
]
