r"""ShuffleNet V2: half of the channels pass, half are worked on, and then they are shuffled.

Paper    Ma, Zhang, Zheng, Sun. ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. ECCV 2018.
         arXiv:1807.11164 (figure 3, table 5)
Formula  stride 1: shuffle(concat(x1, f(x2)));   stride 2: shuffle(concat(g(x), f(x)));   f: 1x1, 3x3 for each channel,
         1x1;   g: 3x3 for each channel, 1x1
Departs  Widths beside the paper's four follow from 116 channels in proportion, even. Small images: a stem of stride 1
         and no pooling behind it.
"""

from __future__ import annotations

from torch import Tensor, nn

from espalier.compact.widths import SMALL, check, conv_norm, initialise
from espalier.core.blocks import Branches, ChannelShuffle

PUBLISHED = {0.5: (48, 1024), 1.0: (116, 1024), 1.5: (176, 1024), 2.0: (244, 2048)}
"""Width -> outputs of the first stage (which double from stage to stage), and of the last 1x1."""
REPEATS = (4, 8, 4)
STEM = 24


def worked(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """f: the branch that computes."""
    return nn.Sequential(
        *conv_norm(inputs, outputs, activation=nn.ReLU()),
        *conv_norm(outputs, outputs, 3, stride, groups=outputs),
        *conv_norm(outputs, outputs, activation=nn.ReLU()),
    )


def unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """One unit; with stride 2 both branches compute, and on all channels."""
    half = outputs // 2
    if stride == 1:
        both = Branches(nn.Identity(), worked(half, half, 1), sizes=(half, half))
    else:
        passed = nn.Sequential(
            *conv_norm(inputs, inputs, 3, stride, groups=inputs), *conv_norm(inputs, half, activation=nn.ReLU())
        )
        both = Branches(passed, worked(inputs, half, stride))
    return nn.Sequential(both, ChannelShuffle(2))


class ShuffleNetV2(nn.Module):
    """Input (batch, ``channels``, ``size``, ``size``), output (batch, ``classes``)."""

    def __init__(self, classes: int = 1000, *, width: float = 1.0, size: int = 224, channels: int = 3) -> None:
        super().__init__()
        check(width=width, size=size, classes=classes, channels=channels)
        outputs, last = PUBLISHED.get(width, (max(2, 2 * round(58 * width)), 2048 if width > 1.5 else 1024))
        layers = conv_norm(channels, STEM, 3, 1 if size < SMALL else 2, activation=nn.ReLU())
        layers += [] if size < SMALL else [nn.MaxPool2d(3, 2, 1)]
        inputs = STEM
        for repeats in REPEATS:
            layers += [unit(inputs, outputs, 2), *(unit(outputs, outputs, 1) for _ in range(repeats - 1))]
            inputs, outputs = outputs, 2 * outputs
        self.features = nn.Sequential(*layers, *conv_norm(inputs, last, activation=nn.ReLU()))
        self.classifier = nn.Linear(last, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores
