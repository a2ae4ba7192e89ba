r"""SqueezeNet: fire modules, pooling early or late, and no fully connected layer.

Paper    Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer. SqueezeNet: AlexNet-level accuracy with 50x fewer parameters
         and <0.5MB model size. 2016. arXiv:1602.07360
Formula  conv1, 8 fire modules (1x1 to s, then 1x1 and 3x3 to e each), 1x1 to the classes, global average pooling
Departs  Version 1.1 as its authors published it later: a 3x3 stem, and pooling earlier. Small images: a 3x3 stem of
         stride 1. Fresh weights by Kaiming's rule.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from espalier.compact.widths import SMALL, check, initialise
from espalier.core.blocks import Branches

FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Channels squeezed to, and expanded to by each kernel."""
POOLS: dict[str, tuple[int, ...]] = {"1.0": (0, 3, 7), "1.1": (0, 2, 4)}
"""Pooling stands behind the stem (0) and behind these fire modules."""


def fire(inputs: int, squeeze: int, expand: int) -> nn.Sequential:
    """A fire module with ``2 * expand`` outputs."""
    return nn.Sequential(
        nn.Conv2d(inputs, squeeze, 1), nn.ReLU(),
        Branches(nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)), nn.ReLU(),
    )  # fmt: skip


class SqueezeNet(nn.Module):
    """Input (batch, ``channels``, ``size``, ``size``), output (batch, ``classes``)."""

    def __init__(
        self, classes: int = 1000, *, width: float = 1.0, size: int = 224, channels: int = 3,
        version: Literal["1.0", "1.1"] = "1.0",
    ) -> None:  # fmt: skip
        super().__init__()
        check(width=width, size=size, classes=classes, channels=channels)
        stem = max(1, round((96 if version == "1.0" else 64) * width))
        kernel = 7 if version == "1.0" and size >= SMALL else 3
        first = nn.Conv2d(channels, stem, kernel, 2) if size >= SMALL else nn.Conv2d(channels, stem, 3, 1, 1)
        layers: list[nn.Module] = [first, nn.ReLU()]
        inputs = stem
        for number in range(len(FIRES) + 1):
            if number:
                squeeze, expand = (max(1, round(count * width)) for count in FIRES[number - 1])
                layers.append(fire(inputs, squeeze, expand))
                inputs = 2 * expand
            if number in POOLS[version]:
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Conv2d(inputs, classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.dropout(self.features(x))).relu().mean((2, 3))
        return scores
