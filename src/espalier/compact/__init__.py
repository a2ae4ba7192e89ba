"""Compact networks: ready ones for images, and blocks that stand for the layers of a trained one."""

from espalier.compact.asymmetric_kernels import AsymmetricKernels
from espalier.compact.bottleneck import Bottleneck
from espalier.compact.depthwise_separable import DepthwiseSeparable
from espalier.compact.dilated import Dilated
from espalier.compact.fire import Fire
from espalier.compact.ghost import Ghost
from espalier.compact.ghostnet import GhostNet
from espalier.compact.global_pooling import GlobalPooling
from espalier.compact.inverted_residual import InvertedResidual
from espalier.compact.mobilenet_v1 import MobileNetV1
from espalier.compact.mobilenet_v2 import MobileNetV2
from espalier.compact.parts import Block, Layer
from espalier.compact.ready import build, networks
from espalier.compact.resnet import CifarResNet, load_pretrained, resnet20, resnet56
from espalier.compact.shuffle import Shuffle
from espalier.compact.shufflenet_v2 import ShuffleNetV2
from espalier.compact.squeezenet import SqueezeNet
from espalier.compact.stacked_3x3 import Stacked3x3
from espalier.compact.swap import Swap
from espalier.core.registry import register

METHODS = register(
    "compact",
    (
        AsymmetricKernels, Stacked3x3, Dilated, GlobalPooling, Bottleneck, Fire, DepthwiseSeparable, InvertedResidual,
        Shuffle, Ghost, Swap,
    ),
)  # fmt: skip

__all__ = [
    "AsymmetricKernels",
    "Block",
    "Bottleneck",
    "CifarResNet",
    "DepthwiseSeparable",
    "Dilated",
    "Fire",
    "Ghost",
    "GhostNet",
    "GlobalPooling",
    "InvertedResidual",
    "Layer",
    "MobileNetV1",
    "MobileNetV2",
    "Shuffle",
    "ShuffleNetV2",
    "SqueezeNet",
    "Stacked3x3",
    "Swap",
    "build",
    "load_pretrained",
    "networks",
    "resnet20",
    "resnet56",
]
