"""The ready networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from espalier.compact.ghostnet import GhostNet
from espalier.compact.mobilenet_v1 import MobileNetV1
from espalier.compact.mobilenet_v2 import MobileNetV2
from espalier.compact.shufflenet_v2 import ShuffleNetV2
from espalier.compact.squeezenet import SqueezeNet
from espalier.core.errors import UnknownNameError, did_you_mean

Builder = Callable[..., nn.Module]
"""``builder(classes, *, width, size, channels)``."""


def networks() -> dict[str, Builder]:
    """Name -> builder of a fresh network for images."""
    return {
        "squeezenet-1.0": partial(SqueezeNet, version="1.0"),
        "squeezenet-1.1": partial(SqueezeNet, version="1.1"),
        "mobilenet-v1": MobileNetV1,
        "mobilenet-v2": MobileNetV2,
        "shufflenet-v2": ShuffleNetV2,
        "ghostnet": GhostNet,
    }


def build(name: str, *, classes: int = 1000, width: float = 1.0, size: int = 224, channels: int = 3) -> nn.Module:
    """A fresh network for images of ``size`` x ``size`` pixels; ``width`` multiplies its channels.

    Weights come from torch's global generator. Raises ``UnknownNameError``, ``UsageError``.
    """
    known = networks()
    if name not in known:
        raise UnknownNameError(f"no network is called {name!r}.{did_you_mean(name, known)}")
    return known[name](classes, width=width, size=size, channels=channels)
