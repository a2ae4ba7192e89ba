"""The one training loop, and what the literature calls training tricks."""

from __future__ import annotations

from espalier.core.method import Method
from espalier.core.registry import register
from espalier.train.adamw import AdamW
from espalier.train.augmentation import Augmentation
from espalier.train.batch_norm import BatchNorm, reestimate
from espalier.train.cosine import Cosine
from espalier.train.crop import Crop
from espalier.train.curriculum_dropout import CurriculumDropout
from espalier.train.cutout import Cutout
from espalier.train.dropout import Dropout
from espalier.train.dropout_schedule import DropoutSchedule
from espalier.train.early_dropout import EarlyDropout
from espalier.train.early_stopping import EarlyStopping
from espalier.train.ema import EMA
from espalier.train.finetune import Finetune
from espalier.train.flip import Flip
from espalier.train.l1 import L1
from espalier.train.l2 import L2
from espalier.train.label_smoothing import LabelSmoothing
from espalier.train.loop import FitResult, fit
from espalier.train.mixup import Mixup
from espalier.train.one_cycle import OneCycle
from espalier.train.optimizer import SGD, Optimizer
from espalier.train.penalty import WeightPenalty
from espalier.train.resized_crop import ResizedCrop
from espalier.train.schedule import Constant, LearningRateSchedule, Linear, Step
from espalier.train.shift import Shift
from espalier.train.training import Training

METHODS: tuple[type[Method], ...] = (
    Finetune, BatchNorm, Dropout, SGD, AdamW, Constant, Linear, Step, Cosine, OneCycle, L1, L2, LabelSmoothing,
    EarlyStopping, EMA, CurriculumDropout, EarlyDropout, Crop, ResizedCrop, Flip, Shift, Cutout, Mixup,
)  # fmt: skip

register("train", METHODS)

__all__ = [
    "EMA", "L1", "L2", "METHODS", "SGD", "AdamW", "Augmentation", "BatchNorm", "Constant", "Cosine", "Crop",
    "CurriculumDropout", "Cutout", "Dropout", "DropoutSchedule", "EarlyDropout", "EarlyStopping", "Finetune",
    "FitResult", "Flip", "LabelSmoothing", "LearningRateSchedule", "Linear", "Mixup", "OneCycle", "Optimizer",
    "ResizedCrop", "Shift", "Step", "Training", "WeightPenalty", "fit", "reestimate",
]  # fmt: skip
