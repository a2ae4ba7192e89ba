"""Pruning: criterion x pattern x scope x schedule."""

from espalier.core.registry import register
from espalier.prune.activation_mean import ActivationMean
from espalier.prune.activations import Activations
from espalier.prune.apoz import AveragePercentageOfZeros
from espalier.prune.backward import Backward
from espalier.prune.blocks import Blocks
from espalier.prune.causality import Causality
from espalier.prune.channels import Channels
from espalier.prune.connections import Connections
from espalier.prune.dropout import Dropout
from espalier.prune.dropout_rule import DropoutRule
from espalier.prune.entropy import Entropy
from espalier.prune.fpgm import GeometricMedian
from espalier.prune.grasp import Grasp
from espalier.prune.group_lasso import GroupLasso
from espalier.prune.growing import Growing
from espalier.prune.hard_concrete import HardConcrete
from espalier.prune.heads import Heads
from espalier.prune.hrank import HRank
from espalier.prune.isomorphic import Isomorphic
from espalier.prune.kernel_parts import KernelParts
from espalier.prune.kernel_patterns import KernelPatterns
from espalier.prune.l1 import L1
from espalier.prune.lamp import Lamp
from espalier.prune.layers import Layers
from espalier.prune.loss_prune import LossPrune
from espalier.prune.loss_terms import CompositeLoss, LossTerms, redundant_terms
from espalier.prune.magnitude import Magnitude
from espalier.prune.mean_weight import MeanWeight
from espalier.prune.momentum import Momentum
from espalier.prune.movement import Movement
from espalier.prune.n_m import NM
from espalier.prune.obd import OptimalBrainDamage
from espalier.prune.obs import OBS
from espalier.prune.parts import Criterion, Pattern, Regrowth, Schedule, Scope
from espalier.prune.penalty import SparsityPenalty
from espalier.prune.prune import Prune
from espalier.prune.random import Random
from espalier.prune.regrowth import GradientRegrowth, MomentumRegrowth
from espalier.prune.regularize import Regularize
from espalier.prune.removal import Slimmed, remove_channels
from espalier.prune.saliency import Saliency
from espalier.prune.scale import Scale
from espalier.prune.schedules import Cubic, Exponential, Linear, Listed, OneShot, Percentile
from espalier.prune.scopes import Apart, Global, Layer, Row
from espalier.prune.sensitivity import Sensitivity
from espalier.prune.singular import Singular
from espalier.prune.slimming import Slimming
from espalier.prune.snip import Snip
from espalier.prune.synflow import SynFlow
from espalier.prune.targeted_dropout import TargetedDropout
from espalier.prune.tensors import Tensors
from espalier.prune.threshold import Threshold
from espalier.prune.torch_masks import from_torch, to_torch
from espalier.prune.units import Units
from espalier.prune.variational_dropout import VariationalDropout
from espalier.prune.wanda import Wanda
from espalier.prune.weights import Weights

METHODS = register(
    "prune",
    (
        *(Prune, Causality),
        *(Magnitude, Threshold, Random, OBS),
        *(Sensitivity, OptimalBrainDamage, Wanda, Lamp, Momentum),
        *(GeometricMedian, MeanWeight, Saliency, ActivationMean, AveragePercentageOfZeros, Entropy, HRank),
        *(Weights, NM, Blocks, KernelParts, KernelPatterns, Units, Tensors, Singular),
        *(Channels, Heads, Layers, Activations),
        *(Layer, Row, Global, Apart, Isomorphic),
        *(OneShot, Linear, Cubic, Exponential, Percentile, Listed),
        *(MomentumRegrowth, GradientRegrowth),
        *(Movement, Regularize, L1, GroupLasso, Growing, HardConcrete),
        *(Slimming, Scale, Dropout, TargetedDropout, VariationalDropout, Backward, LossPrune, Snip, Grasp, SynFlow),
    ),
)

__all__ = [
    "L1",
    "NM",
    "OBS",
    "ActivationMean",
    "Activations",
    "Apart",
    "AveragePercentageOfZeros",
    "Backward",
    "Blocks",
    "Causality",
    "Channels",
    "CompositeLoss",
    "Connections",
    "Criterion",
    "Cubic",
    "Dropout",
    "DropoutRule",
    "Entropy",
    "Exponential",
    "GeometricMedian",
    "Global",
    "GradientRegrowth",
    "Grasp",
    "GroupLasso",
    "Growing",
    "HRank",
    "HardConcrete",
    "Heads",
    "Isomorphic",
    "KernelParts",
    "KernelPatterns",
    "Lamp",
    "Layer",
    "Layers",
    "Linear",
    "Listed",
    "LossPrune",
    "LossTerms",
    "Magnitude",
    "MeanWeight",
    "Momentum",
    "MomentumRegrowth",
    "Movement",
    "OneShot",
    "OptimalBrainDamage",
    "Pattern",
    "Percentile",
    "Prune",
    "Random",
    "Regrowth",
    "Regularize",
    "Row",
    "Saliency",
    "Scale",
    "Schedule",
    "Scope",
    "Sensitivity",
    "Singular",
    "Slimmed",
    "Slimming",
    "Snip",
    "SparsityPenalty",
    "SynFlow",
    "TargetedDropout",
    "Tensors",
    "Threshold",
    "Units",
    "VariationalDropout",
    "Wanda",
    "Weights",
    "from_torch",
    "redundant_terms",
    "remove_channels",
    "to_torch",
]  # fmt: skip
