r"""MobileNetV2: inverted residuals between linear bottlenecks.

Paper    Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. CVPR 2018.
         arXiv:1801.04381 (table 2)
Formula  1x1 to t I, BN, ReLU6, 3x3 for each channel, BN, ReLU6, 1x1 to O, BN; x is added where stride 1 and I = O
Departs  Widths are rounded to multiples of 8; the last 1x1 keeps 1280 channels below width 1. Small images: the first
         two strides of 2 are 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from espalier.compact.widths import check, conv_norm, initialise, rounded, strides
from espalier.core.blocks import Add

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion t, outputs, how often, stride of the first."""


def inverted_residual(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """One block; without an expansion there is no first 1x1."""
    inner = inputs * expansion
    layers = conv_norm(inputs, inner, activation=nn.ReLU6()) if expansion > 1 else []
    layers += conv_norm(inner, inner, 3, stride, groups=inner, activation=nn.ReLU6())
    block = nn.Sequential(*layers, *conv_norm(inner, outputs))
    return Add(nn.Identity(), block) if stride == 1 and inputs == outputs else block


class MobileNetV2(nn.Module):
    """Input (batch, ``channels``, ``size``, ``size``), output (batch, ``classes``)."""

    def __init__(self, classes: int = 1000, *, width: float = 1.0, size: int = 224, channels: int = 3) -> None:
        super().__init__()
        check(width=width, size=size, classes=classes, channels=channels)
        inputs, last = rounded(32 * width), rounded(1280 * max(1.0, width))
        first, *others = strides(size, (2, *(stage[3] for stage in STAGES)))
        layers = conv_norm(channels, inputs, 3, first, activation=nn.ReLU6())
        for (expansion, count, repeats, _), stride in zip(STAGES, others, strict=True):
            outputs = rounded(count * width)
            for number in range(repeats):
                layers.append(inverted_residual(inputs, outputs, 1 if number else stride, expansion))
                inputs = outputs
        self.features = nn.Sequential(*layers, *conv_norm(inputs, last, activation=nn.ReLU6()))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(last, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.dropout(self.features(x).mean((2, 3))))
        return scores
