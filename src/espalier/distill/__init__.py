"""Distillation: what a network has learned is taught to another, or to what a step before has made of it."""

from espalier.core.registry import register
from espalier.distill.assistant import Assistant
from espalier.distill.attention import Attention
from espalier.distill.distill import Distill
from espalier.distill.dkd import DKD
from espalier.distill.features import Features
from espalier.distill.hints import Hints
from espalier.distill.logits import Logits
from espalier.distill.multi_teacher import MultiTeacher
from espalier.distill.mutual import Mutual
from espalier.distill.parts import DistillLoss, FeatureLoss, OutputLoss, Teaching
from espalier.distill.relational import Relational
from espalier.distill.self_distillation import SelfDistillation
from espalier.distill.single import Single
from espalier.distill.soft_targets import SoftTargets

METHODS = register("distill", (
    Distill, SoftTargets, Logits, Hints, Features, Attention, Relational, DKD, Single, MultiTeacher, Assistant, Mutual,
    SelfDistillation,
))  # fmt: skip

__all__ = [
    "DKD", "METHODS", "Assistant", "Attention", "Distill", "DistillLoss", "FeatureLoss", "Features", "Hints", "Logits",
    "MultiTeacher", "Mutual", "OutputLoss", "Relational", "SelfDistillation", "Single", "SoftTargets", "Teaching",
]  # fmt: skip
