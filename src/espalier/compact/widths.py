"""What the ready networks share: widths in round numbers, strides that suit the size of the images, fresh weights."""

from __future__ import annotations

from torch import nn

from espalier.core.errors import UsageError

SMALL = 64
"""Images below this keep their size in the first two places where a network for 224 x 224 halves it."""


def check(*, width: float, size: int, classes: int, channels: int) -> None:
    """Raise ``UsageError`` naming everything that no network can be built with."""
    problems = [
        text
        for wrong, text in (
            (not 0 < width <= 100, f"width={width!r} must be above 0 and at most 100"),
            (size < 8, f"size={size!r} must be at least 8 pixels"),
            (classes < 1, f"classes={classes!r} must be at least 1"),
            (channels < 1, f"channels={channels!r} must be at least 1"),
        )
        if wrong
    ]
    if problems:
        raise UsageError(f"this network cannot be built: {'; '.join(problems)}.")


def rounded(channels: float, multiple: int = 8) -> int:
    """The nearest multiple, at least one, never more than a tenth below ``channels``."""
    near = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return near if near >= 0.9 * channels else near + multiple


def strides(size: int, plan: tuple[int, ...]) -> list[int]:
    """The strides of ``plan``, meant for 224 x 224, for images of ``size``: small ones lose the first two halvings."""
    spare = 2 if size < SMALL else 0
    found = []
    for stride in plan:
        drop = stride > 1 and spare > 0
        spare -= drop
        found.append(1 if drop else stride)
    return found


def conv_norm(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, activation: nn.Module | None = None
) -> list[nn.Module]:  # fmt: skip
    """A convolution that keeps the size at stride 1, a batch norm, and an activation if there is one."""
    found: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return found if activation is None else [*found, activation]


def initialise(network: nn.Module) -> None:
    """Kaiming's normal distribution over the outputs for convolutions, 0.01 wide for linear layers; biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
