"""What a spec needs beside layers in a row: branches joined or added, channels cut off, zeros around.

Compact blocks are made of these, so that a plan can describe them. They hold no weights of their own, and they check
what they are given when they are built, as a plan may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_PADS = 4096
"""How many entries may be put on, or taken off, one end of a dimension."""


def whole(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value``, a whole number of at least ``low``. Raises ``ValueError`` for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be a whole number of at least {low}{most}; got {value!r}")
    return value


class Branches(nn.Sequential):
    """Children side by side, their results joined along the channels (dimension 1).

    Every child gets the whole input; with ``sizes`` each gets so many of its channels, one after the other.
    """

    def __init__(self, *children: nn.Module, sizes: Sequence[int] | None = None) -> None:
        super().__init__(*children)
        if not children:
            raise ValueError("branches need at least one child")
        if sizes is not None and len(sizes) != len(children):
            raise ValueError(f"sizes={tuple(sizes)} must have one entry for each of the {len(children)} branches")
        self.sizes = None if sizes is None else tuple(whole(size, "sizes", 1) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, ...)."""
        parts = [x] * len(self) if self.sizes is None else torch.split(x, list(self.sizes), 1)
        return torch.cat([child(part) for child, part in zip(self, parts, strict=True)], 1)

    def extra_repr(self) -> str:
        """The sizes, where there are any."""
        return "" if self.sizes is None else f"sizes={self.sizes}"


class Add(nn.Sequential):
    """Children side by side, their results added: with an ``Identity`` among them a residual block."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__(*children)
        if not children:
            raise ValueError("a sum needs at least one child")

    def forward(self, x: Tensor) -> Tensor:
        """``x``: whatever all children take."""
        first, *others = self
        total: Tensor = first(x)
        for child in others:
            total = total + child(x)
        return total


class ChannelShuffle(nn.ChannelShuffle):
    """Channels of ``groups`` groups dealt out in turn: channel ``a * n + r`` goes to place ``r * groups + a``."""

    def __init__(self, groups: int) -> None:
        super().__init__(whole(groups, "groups", 1))


class First(nn.Module):
    """The first ``channels`` channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole(channels, "channels", 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, ...)."""
        return x[:, : self.channels]

    def extra_repr(self) -> str:
        """How many."""
        return f"channels={self.channels}"


class Pad(nn.Module):
    """Zeros around, by ``amounts`` as :func:`torch.nn.functional.pad` takes them; below 0 entries are cut off."""

    def __init__(self, amounts: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(amounts, (list, tuple)) or len(amounts) not in (2, 4, 6):
            raise ValueError(f"amounts must be two whole numbers for each of 1 to 3 dimensions; got {amounts!r}")
        self.amounts = tuple(whole(amount, "amounts", -MOST_PADS, MOST_PADS) for amount in amounts)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, channels, ...)."""
        return F.pad(x, self.amounts)

    def extra_repr(self) -> str:
        """The amounts."""
        return f"amounts={self.amounts}"


COMBINATORS: dict[str, type[nn.Sequential]] = {cls.__name__: cls for cls in (nn.Sequential, Branches, Add)}
"""What takes children in a spec."""
