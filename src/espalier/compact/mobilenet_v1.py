r"""MobileNet: depthwise separable convolutions all the way.

Paper    Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam. MobileNets: Efficient Convolutional Neural
         Networks for Mobile Vision Applications. 2017. arXiv:1704.04861 (table 1)
Formula  3x3 stem, 13 times (3x3 for each channel, BN, ReLU, 1x1, BN, ReLU), global average pooling, linear
Departs  Widths are rounded to multiples of 8. Small images: the first two strides of 2 are 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from espalier.compact.widths import check, conv_norm, initialise, rounded, strides

CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class MobileNetV1(nn.Module):
    """Input (batch, ``channels``, ``size``, ``size``), output (batch, ``classes``)."""

    def __init__(self, classes: int = 1000, *, width: float = 1.0, size: int = 224, channels: int = 3) -> None:
        super().__init__()
        check(width=width, size=size, classes=classes, channels=channels)
        inputs, *outputs = (rounded(count * width) for count in CHANNELS)
        first, *others = strides(size, STRIDES)
        layers = conv_norm(channels, inputs, 3, first, activation=nn.ReLU())
        for count, stride in zip(outputs, others, strict=True):
            layers.append(
                nn.Sequential(
                    *conv_norm(inputs, inputs, 3, stride, groups=inputs, activation=nn.ReLU()),
                    *conv_norm(inputs, count, activation=nn.ReLU()),
                )
            )
            inputs = count
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores
