r"""Residual networks for 32 x 32 images, as He et al. built them for CIFAR-10.

Paper    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385 (section 4.2)
Formula  3 stages of n blocks of two 3x3 convolutions, 16, 32 and 64 channels, depth 6 n + 2; shortcuts without
         parameters (option A): every second pixel, missing channels zero
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import DataError, UsageError

WIDTHS = (16, 32, 64)


class Shortcut(nn.Module):
    """Every ``stride``-th pixel, with ``before`` and ``after`` zero channels around (option A)."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, height, width)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        missing = width - channels
        same = stride == 1 and not missing
        self.shortcut = nn.Identity() if same else Shortcut(stride, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, height, width)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def stage(channels: int, width: int, count: int, *, stride: int) -> nn.Sequential:
    """``count`` blocks of ``width`` channels; the first one takes the stride."""
    first = Block(channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1)))


class CifarResNet(nn.Module):
    """``depth`` = 6 n + 2 layers; input (batch, 3, height, width), output (batch, ``classes``).

    Raises UsageError for a depth that is not 6 n + 2.
    """

    def __init__(self, depth: int = 20, classes: int = 10, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"depth={depth}: a CIFAR ResNet has 6 n + 2 layers: 8, 14, 20, 32, 44, 56, 110 ...")
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        count = (depth - 2) // 6
        self.layer1 = stage(widths[0], widths[0], count, stride=1)
        self.layer2 = stage(widths[0], widths[1], count, stride=2)
        self.layer3 = stage(widths[1], widths[2], count, stride=2)
        self.linear = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def resnet20(classes: int = 10) -> CifarResNet:
    """0.27 million parameters, 41 million multiply-adds."""
    return CifarResNet(20, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """0.85 million parameters, 126 million multiply-adds."""
    return CifarResNet(56, classes)


def load_pretrained(model: CifarResNet, path: str | Path) -> CifarResNet:
    """Fill ``model`` from a published checkpoint (``state_dict`` with keys that may start with ``module.``).

    Read without executing anything. Raises DataError for a file that is none, or of another depth.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} cannot be read as weights: {error}") from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping):
        raise DataError(f"{path} holds no state dict.")
    try:
        model.load_state_dict({str(name).removeprefix("module."): value for name, value in state.items()})
    except RuntimeError as error:
        raise DataError(f"{path} does not fit this network: {str(error).splitlines()[-1].strip()}") from error
    return model
