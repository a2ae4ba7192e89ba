"""Which features of student and teacher a loss compares, and the adapters between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError, NumericError
from espalier.distill.parts import FeatureLoss
from espalier.distill.places import Place, Seen, channels_first, given, require, same_size

Features = Mapping[Place, Tensor]


@dataclass
class Pairing:
    """What one loss compares with one teacher: what was seen at both places of each pair, and its adapter."""

    loss: FeatureLoss
    teacher: int
    pairs: list[tuple[Seen, Seen]]
    adapters: nn.ModuleList

    def value(self, student: Features, teacher: Features) -> Tensor:
        """The loss. Raises ``NumericError`` naming the layer whose features are not finite."""
        found = []
        for pair, adapter in zip(self.pairs, self.adapters, strict=True):
            (mine, a, _), (theirs, b, _) = self._sides(pair, student, teacher)
            if self.loss.aligned:
                a, b = same_size(channels_first(a, mine.channel_dim), channels_first(b, theirs.channel_dim))
                a = adapter(a)
            found.append((a.float(), b.float()))
        with torch.autocast(found[0][0].device.type, enabled=False):  # products of features need more than 8 bits
            value = self.loss.value(found)
        if not bool(torch.isfinite(value)):
            self._blame(student, teacher)
        return value

    def describe(self, teacher: str) -> dict[str, Any]:
        """For the record."""
        pairs = [f"{mine.place} <- {theirs.place}" for mine, theirs in self.pairs]
        return {"loss": self.loss.id, "teacher": teacher, "pairs": pairs}

    def _sides(self, pair: tuple[Seen, Seen], student: Features, teacher: Features) -> list[tuple[Seen, Tensor, str]]:
        sides = list(zip(pair, (student, teacher), ("student", "teacher"), strict=True))
        for seen, side, whose in sides:
            if seen.place not in side:
                raise ModelError(f"{self.loss.name}: {seen.place} of the {whose} was not called on this batch.")
        return [(seen, side[seen.place], whose) for seen, side, whose in sides]

    def _blame(self, student: Features, teacher: Features) -> None:
        for pair in self.pairs:
            for seen, features, whose in self._sides(pair, student, teacher):
                if not bool(torch.isfinite(features).all()):
                    raise NumericError(
                        f"{self.loss.name}: the features of {seen.place} in the {whose} hold NaN or infinity. Check "
                        "the batches; where it is the student, lower lr (a tenth is a good first try) or set clip=1."
                    )


def pair_up(
    loss: FeatureLoss,
    index: int,
    student: tuple[nn.Module, Sequence[Seen]],
    teacher: tuple[nn.Module, Sequence[Seen]],
) -> Pairing:
    """The pairs of ``loss`` with the teacher of that index: those it names, else those found by shape.

    Each network comes with what was seen in it. Raises ``UnknownNameError``, ``ModelError``.
    """
    if loss.layers:
        places = given(loss.layers, student[0], teacher[0], loss.name)
    else:
        places = loss.found(student[1], teacher[1])
    if not places:
        raise ModelError(
            f"{loss.name} found no features that fit together: the student has {_sizes(student[1])}, the teacher "
            f"{_sizes(teacher[1])}. Name them: layers={{'path in the student': 'path in the teacher'}}."
        )
    pairs = [require(pair, student[1], teacher[1], loss.name) for pair in places]
    return Pairing(loss, index, pairs, nn.ModuleList([_adapter(loss, *pair) for pair in pairs]))


def _sizes(rows: Sequence[Seen]) -> str:
    shown = dict.fromkeys(f"{row.place} {row.shape[1:]}" for row in rows if row.place.side == "out" and not row.final)
    return ", ".join(list(shown)[:6]) + (" ..." if len(shown) > 6 else "") or "none"


def _adapter(loss: FeatureLoss, mine: Seen, theirs: Seen) -> nn.Module:
    """A linear map over the channels where the loss wants one."""
    if not loss.aligned:
        return nn.Identity()
    both = f"{mine.place} of the student gives {mine.shape} and {theirs.place} of the teacher {theirs.shape}"
    if len(mine.shape) != len(theirs.shape) or len(mine.size) > 3:
        raise ModelError(
            f"{loss.name}: {both}; both must have as many dimensions, five at most. Name another pair in layers."
        )
    alike = mine.channels == theirs.channels
    if loss.adapts == "always" or (loss.adapts == "where-needed" and not alike):
        return _linear(mine.channels, theirs.channels, len(mine.size))
    if loss.per_channel and not alike:
        raise ModelError(f"{loss.name}: {both}, which are compared channel by channel. Set adapters=where-needed.")
    return nn.Identity()


def _linear(inputs: int, outputs: int, sizes: int) -> nn.Module:
    if not sizes:
        return nn.Linear(inputs, outputs)
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[sizes - 1]
    made: nn.Module = convolution(inputs, outputs, 1)
    return made
