r"""GhostNet: inverted residuals whose 1x1 convolutions are ghost modules.

Paper    Han, Wang, Tian, Guo, Xu, Xu. GhostNet: More Features from Cheap Operations. CVPR 2020. arXiv:1911.11907
         (table 1)
Formula  ghost(I -> t), BN, ReLU; [k x k for each channel, stride 2, BN]; [squeeze and excite]; ghost(t -> O), BN;
         plus a shortcut
Departs  Widths are rounded to multiples of 4. Small images: the first two strides of 2 are 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.compact.widths import check, conv_norm, initialise, rounded, strides
from espalier.core.blocks import Add, Branches, First

STAGES = (
    (3, 16, 16, False, 1), (3, 48, 24, False, 2), (3, 72, 24, False, 1), (5, 72, 40, True, 2), (5, 120, 40, True, 1),
    (3, 240, 80, False, 2), (3, 200, 80, False, 1), (3, 184, 80, False, 1), (3, 184, 80, False, 1),
    (3, 480, 112, True, 1), (3, 672, 112, True, 1), (5, 672, 160, True, 2), (5, 960, 160, False, 1),
    (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1),
)  # fmt: skip
"""Kernel, inner channels, outputs, squeeze and excite, stride."""


def ghost(inputs: int, outputs: int, *, active: bool) -> nn.Sequential:
    """A ghost module of ratio 2 with 1x1 kernels, 3x3 for the ghosts."""
    full = -(-outputs // 2)
    act = nn.ReLU() if active else None
    cheap = nn.Sequential(*conv_norm(full, full, 3, groups=full, activation=act))
    cut = [First(outputs)] if outputs % 2 else []
    return nn.Sequential(*conv_norm(inputs, full, activation=act), Branches(nn.Identity(), cheap), *cut)


class SqueezeExcite(nn.Module):
    """Channels scaled by what a quarter of them say about the whole map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        few = rounded(channels / 4, 4)
        self.reduce, self.expand = nn.Conv2d(channels, few, 1), nn.Conv2d(few, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, height, width)."""
        scale = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(scale)


def ghost_bottleneck(inputs: int, inner: int, outputs: int, kernel: int, stride: int, *, excite: bool) -> nn.Module:
    """One block with its shortcut."""
    layers: list[nn.Module] = [ghost(inputs, inner, active=True)]
    if stride > 1:
        layers += conv_norm(inner, inner, kernel, stride, groups=inner)
    if excite:
        layers.append(SqueezeExcite(inner))
    layers.append(ghost(inner, outputs, active=False))
    shortcut: nn.Module = nn.Identity()
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(*conv_norm(inputs, inputs, kernel, stride, groups=inputs), *conv_norm(inputs, outputs))
    return Add(shortcut, nn.Sequential(*layers))


class GhostNet(nn.Module):
    """Input (batch, ``channels``, ``size``, ``size``), output (batch, ``classes``)."""

    def __init__(self, classes: int = 1000, *, width: float = 1.0, size: int = 224, channels: int = 3) -> None:
        super().__init__()
        check(width=width, size=size, classes=classes, channels=channels)
        inputs, last = rounded(16 * width, 4), rounded(960 * width, 4)
        first, *others = strides(size, (2, *(stage[4] for stage in STAGES)))
        layers = conv_norm(channels, inputs, 3, first, activation=nn.ReLU())
        for (kernel, inner, count, excite, _), stride in zip(STAGES, others, strict=True):
            outputs = rounded(count * width, 4)
            layers.append(ghost_bottleneck(inputs, rounded(inner * width, 4), outputs, kernel, stride, excite=excite))
            inputs = outputs
        self.features = nn.Sequential(*layers, *conv_norm(inputs, last, activation=nn.ReLU()))
        self.head = nn.Linear(last, 1280)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        hidden = F.relu(self.head(self.features(x).mean((2, 3))))
        scores: Tensor = self.classifier(self.dropout(hidden))
        return scores
