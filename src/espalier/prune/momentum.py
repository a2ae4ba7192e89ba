r"""Momentum pruning: by the running first moment of each unit's or weight's gradient, or by an activation's moments.

Paper    none
Formula  m_t = b m_{t-1} + (1 - b) g_t,   g_t: gradient of batch t at a weight, at a unit's output or at its gate
         z = share of steps with sign(w) m_t > 0;   d = share of steps at which sign(m_t) differs from sign(m_{t-1})
         s = mean_t |m_t a_t| (1 - z), ties by d;   a moment of the activation instead where ``moment`` names one
Departs  A definition of this project. The steps are batches at fixed weights. For a weight, a = w; for a unit's output,
         g and a are means over samples and positions and the sign of w is that of the mean output; at a
         gate (a factor of 1 on the unit's output) a = w = 1. Regrowth by momentum (Dettmers, Zettlemoyer 2019,
         arXiv:1907.04840) is not part of the criterion. A moment scores by its absolute value, so a unit that hardly
         varies goes first; ``fold=true`` of pattern channels adds its mean to the next layer's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.fields import Batches
from espalier.core.fields import Momentum as Decay
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import averages, stream
from espalier.train.looking import each_gradient

Signal = Literal["combined", "size", "toward-zero", "turns"]
Moment = Literal["first", "mean", "variance", "skewness", "kurtosis"]


class Track:
    """The running first moment of a gradient of any shape, and what it did over the steps."""

    def __init__(self, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.moment, self.size, self.shrinking, self.turned = (torch.zeros(()) for _ in range(4))

    def update(self, gradient: Tensor, weight: Tensor, activation: Tensor) -> None:
        """One step: ``weight`` lends its sign, ``activation`` multiplies the moment; shapes as the gradient's."""
        before = self.moment.to(gradient)
        self.moment = self.decay * before + (1 - self.decay) * gradient
        self.size = self.size.to(gradient) + (self.moment * activation).abs()
        self.shrinking = self.shrinking.to(gradient) + (weight.sign() * self.moment > 0)
        self.turned = self.turned.to(gradient) + (self.moment * before < 0)
        self.steps += 1

    def score(self, signal: Signal) -> Tensor:
        """Low goes first: little use, drift toward zero (z), turns of direction (d); combined: all three."""
        size, z = self.size / self.steps, self.shrinking / self.steps
        d = self.turned / max(self.steps - 1, 1)
        if signal == "size":
            return size
        if signal != "combined":
            return 1 - (z if signal == "toward-zero" else d)
        combined = size * (1 - z)
        return combined + 1e-6 * (combined.amax() if bool(combined.any()) else 1.0) * (1 - d)


def standardised(powers: Tensor, moment: Moment) -> Tensor:
    """(units, 4) means of a, a^2, a^3, a^4 -> (units,): |mean|, variance, |skewness| or kurtosis; constants have 0."""
    m1, m2, m3, m4 = powers.double().unbind(1)
    if moment == "mean":
        return m1.abs()
    variance = (m2 - m1**2).clamp_min(0)
    variance = torch.where(variance > 1e-12 * m2, variance, torch.zeros_like(variance))  # below: rounding
    if moment == "variance":
        return variance
    third, fourth = m3 - 3 * m1 * m2 + 2 * m1**3, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    ratio = third.abs() / variance**1.5 if moment == "skewness" else fourth / variance**2
    return torch.where(variance > 0, ratio, torch.zeros_like(ratio))


def powers(activation: Tensor) -> Tensor:
    """(samples, units, *positions) -> (samples, units, 4): means of the first four powers over the positions."""
    flat = activation.double().reshape(*activation.shape[:2], -1)
    return torch.stack([(flat**power).mean(2) for power in range(1, 5)], 2)


@dataclass(frozen=True, kw_only=True)
class Momentum(Criterion):
    """Score = use of the first moment x (1 - drift toward zero), of output units or of single weights (``level``).

    ``signal``: the three together, or one alone. ``at``: where a unit's gradient is taken. ``moment``: other than
    first, a moment of the unit's activation is the score and no gradient is needed.
    """

    id: ClassVar[str] = "momentum"
    level: Literal["units", "weights"] = "units"
    moment: Moment = "first"
    signal: Signal = "combined"
    at: Literal["output", "gate"] = "output"
    decay: Decay = 0.9
    batches: Batches = 16

    @property
    def of(self) -> Literal["units", "weights"]:  # type: ignore[override]
        """What is scored follows ``level``."""
        return self.level

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"train", "labels"} if self.moment == "first" else {"train"})

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.level == "weights" and self.moment != "first":
            found.append(f"moment={self.moment} is one of a unit's activation; use level=units")
        if self.moment != "first" and self.signal != "combined":
            found.append(f"signal={self.signal} is read from the first moment; leave moment={self.moment} unset")
        return found

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        if self.moment != "first":
            found = averages(
                model, selection, context, lambda a, _: powers(a), count=self.batches, label="moments", wide=True
            )
            return {name: standardised(score, self.moment).float() for name, score in found.items()}
        tracks: dict[str, Track] = {}

        def follow(name: str, gradient: Tensor, weight: Tensor, activation: Tensor) -> None:
            tracks.setdefault(name, Track(self.decay)).update(gradient, weight, activation)

        def unit(name: str, activation: Tensor, gradient: Tensor | None) -> None:
            assert gradient is not None  # noqa: S101 - asked for below
            a, g = (x.reshape(*x.shape[:2], -1) for x in (activation, gradient))
            if self.at == "gate":
                follow(name, (a * g).sum((0, 2)), a.new_ones(()), a.new_ones(()))
            else:
                follow(name, g.mean((0, 2)), a.mean((0, 2)), a.abs().mean((0, 2)))

        if self.level == "weights":
            each_gradient(
                model, selection, context, against="loss", count=self.batches, label="gradients",
                fn=lambda name, gradient, weight: follow(name, gradient, weight, weight),
            )  # fmt: skip
        else:
            stream(model, selection, context, unit, count=self.batches, label="gradients", against="loss")
        return {slot.name: tracks[slot.name].score(self.signal) for slot in selection if slot.name in tracks}
