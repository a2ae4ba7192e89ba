"""Pruning: criterion x pattern x scope x schedule."""

from espalier.core.registry import register
from espalier.prune.activation_mean import ActivationMean
from espalier.prune.apoz import AveragePercentageOfZeros
from espalier.prune.blocks import Blocks
from espalier.prune.channels import Channels
from espalier.prune.entropy import Entropy
from espalier.prune.fpgm import GeometricMedian
from espalier.prune.heads import Heads
from espalier.prune.hrank import HRank
from espalier.prune.isomorphic import Isomorphic
from espalier.prune.kernel_parts import KernelParts
from espalier.prune.lamp import Lamp
from espalier.prune.magnitude import Magnitude
from espalier.prune.mean_weight import MeanWeight
from espalier.prune.momentum import Momentum
from espalier.prune.n_m import NM
from espalier.prune.obd import OptimalBrainDamage
from espalier.prune.obs import OBS
from espalier.prune.parts import Criterion, Pattern, Regrowth, Schedule, Scope
from espalier.prune.prune import Prune
from espalier.prune.random import Random
from espalier.prune.regrowth import GradientRegrowth, MomentumRegrowth
from espalier.prune.saliency import Saliency
from espalier.prune.schedules import Cubic, Exponential, Linear, Listed, OneShot, Percentile
from espalier.prune.scopes import Apart, Global, Layer, Row
from espalier.prune.sensitivity import Sensitivity
from espalier.prune.singular import Singular
from espalier.prune.tensors import Tensors
from espalier.prune.threshold import Threshold
from espalier.prune.units import Units
from espalier.prune.wanda import Wanda
from espalier.prune.weights import Weights

METHODS = register(
    "prune",
    (
        Prune,
        *(Magnitude, Threshold, Random, OBS),
        *(Sensitivity, OptimalBrainDamage, Wanda, Lamp, Momentum),
        *(GeometricMedian, MeanWeight, Saliency, ActivationMean, AveragePercentageOfZeros, Entropy, HRank),
        *(Weights, NM, Blocks, KernelParts, Units, Tensors, Singular),
        *(Channels, Heads),
        *(Layer, Row, Global, Apart, Isomorphic),
        *(OneShot, Linear, Cubic, Exponential, Percentile, Listed),
        *(MomentumRegrowth, GradientRegrowth),
    ),
)

__all__ = [
    "NM",
    "OBS",
    "ActivationMean",
    "Apart",
    "AveragePercentageOfZeros",
    "Blocks",
    "Channels",
    "Criterion",
    "Cubic",
    "Entropy",
    "Exponential",
    "GeometricMedian",
    "Global",
    "GradientRegrowth",
    "HRank",
    "Heads",
    "Isomorphic",
    "KernelParts",
    "Lamp",
    "Layer",
    "Linear",
    "Listed",
    "Magnitude",
    "MeanWeight",
    "Momentum",
    "MomentumRegrowth",
    "OneShot",
    "OptimalBrainDamage",
    "Pattern",
    "Percentile",
    "Prune",
    "Random",
    "Regrowth",
    "Row",
    "Saliency",
    "Schedule",
    "Scope",
    "Sensitivity",
    "Singular",
    "Tensors",
    "Threshold",
    "Units",
    "Wanda",
    "Weights",
]  # fmt: skip
