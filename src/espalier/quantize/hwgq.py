r"""Half-wave Gaussian quantization: inputs on the levels that are best for a rectified normal distribution.

Paper    Cai, He, Sun, Vasconcelos. Deep Learning with Low Precision by Half-wave Gaussian Quantization. CVPR 2017.
         arXiv:1702.00953
Formula  Q(x) = q_i where t_i < x <= t_{i+1}, 0 where x <= 0;   t_1 = 0, t_i = (q_{i-1} + q_i) / 2, q_i = E[x | t_i < x
         <= t_{i+1}] for x of N(0, 1) (Lloyd-Max), i = 1..2^b - 1;   uniform: q_i = i D, the D of least error
         dQ/dx = 1 where 0 < x <= q_m (clipped), 1 where x > 0 (vanilla), or beyond q_m 1 / (x - q_m + 1) (log-tailed),
         else 0
Departs  The paper gets N(0, 1) from a batch norm without scale and shift right before the quantizer, which is its only
         activation. Here the input is what reaches the layer, so a trained network with scales and pooling in
         between does not have it. ``normalise`` puts Q(x / s) s in its place, s^2 = 2 <max(x, 0)^2> over the
         calibration data: the variance of the normal distribution that was rectified. Negative inputs become 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from espalier.core.inputs import ActivationQuantizer, Input, Observed
from espalier.quantize.grid import fake_quantize

Backward = Literal["clipped", "vanilla", "log-tailed"]


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2).div(math.sqrt(2 * math.pi))


def _tail(x: Tensor) -> Tensor:
    """P(X > x)."""
    return torch.erfc(x / math.sqrt(2)).div(2)


def thresholds(levels: Tensor) -> Tensor:
    """0 and the middles between neighbouring levels: where each level begins."""
    return torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2])


def centroids(levels: Tensor) -> Tensor:
    """E[x | x nearest to the level, x > 0] for x of N(0, 1), of every level."""
    begin = thresholds(levels)
    density, tail = _density(begin), _tail(begin)
    end_density, end_tail = (torch.cat([v[1:], v.new_zeros(1)]) for v in (density, tail))
    return (density - end_density) / (tail - end_tail)


@cache
def lloyd_max(count: int) -> tuple[float, ...]:
    """The ``count`` positive levels of least squared error for N(0, 1) above 0, by Newton steps on q = E[x | q]."""
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * math.sqrt(2) * torch.erfinv(place)  # best for many levels (Panter and Dite)
    for _ in range(100):
        gap = centroids(levels) - levels
        if float(gap.abs().max()) < 1e-13:
            break
        slope = torch.func.jacrev(centroids)(levels)
        step = torch.linalg.solve(torch.eye(count, dtype=torch.float64) - slope, gap)
        while not bool((torch.diff(levels + step, prepend=levels.new_zeros(1)) > 0).all()):
            step = step / 2
        levels = levels + step
    return tuple(levels.tolist())


def error(levels: Tensor) -> float:
    """E[(x - Q(x))^2 | x > 0] up to the constant 1, for x of N(0, 1)."""
    begin = thresholds(levels)
    mass, first = _tail(begin), _density(begin)
    mass, first = (v - torch.cat([v[1:], v.new_zeros(1)]) for v in (mass, first))
    return float(2 * (levels.square() * mass - 2 * levels * first).sum())


@cache
def uniform_step(count: int) -> float:
    """The D whose levels D, 2D, .. ``count`` D have the least squared error, by golden section."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    low, high, ratio = 0.0, 4.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-10:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left * steps) < error(right * steps) else (left, high)
    return (low + high) / 2


class _Levels(torch.autograd.Function):
    """The quantized input forward, one of the paper's three slopes backward; ``top``: q_m in units of ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor, top: Tensor, scale: Tensor, backward: Backward) -> Tensor:
        ctx.save_for_backward(x, top, scale)
        ctx.rule = backward
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, top, scale = ctx.saved_tensors
        x, grad = x / scale, torch.where(x > 0, grads[0], 0)
        if ctx.rule == "clipped":
            grad = torch.where(x <= top, grad, 0)
        elif ctx.rule == "log-tailed":
            grad = torch.where(x <= top, grad, grad / (x - top + 1).clamp_min(1))
        return grad.to(grads[0].dtype), None, None, None, None


@dataclass(frozen=True, kw_only=True)
class HWGQ(ActivationQuantizer):
    """Zero and 2^b - 1 levels above it. ``backward``: the slope in training."""

    id: ClassVar[str] = "hwgq"
    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 8))  # 8 bits are the ends', and data have a sign: affine
    uniform: bool = True
    backward: Backward = "clipped"
    normalise: bool = False

    def start(self, observed: Observed, bits: int, *, signed: bool) -> dict[str, Tensor]:
        count = 2**bits - 1
        power = float(observed.sample.float().clamp_min(0).square().mean()) if observed.sample.numel() else 0.0
        scale = math.sqrt(2 * power) if self.normalise and power > 0 else 1.0
        step = uniform_step(count)
        levels = [step * i for i in range(1, count + 1)] if self.uniform else list(lloyd_max(count))
        positive = torch.tensor(levels, dtype=torch.float64)
        return {
            "scale": torch.tensor(scale),
            "step": torch.tensor(step * scale),
            "zero": torch.zeros((), dtype=torch.int32),
            "levels": torch.cat([positive.new_zeros(1), positive * scale]).float(),
            "thresholds": (thresholds(positive) * scale).float(),
        }

    def quantize(self, x: Tensor, a: Input) -> Tensor:
        found = self._values(x.detach() if x.requires_grad else x, a)
        if not x.requires_grad:
            return found
        scale = a.state["scale"]
        result = _Levels.apply(x, found, a.state["levels"][-1] / scale, scale, self.backward)  # type: ignore[no-untyped-call]
        assert isinstance(result, Tensor)  # noqa: S101 - torch leaves Function.apply untyped
        return result

    def _values(self, x: Tensor, a: Input) -> Tensor:
        """Q(x); the uniform form through the operator that exports, with all of (0, D] at D."""
        if not self.uniform:
            return a.state["levels"][torch.bucketize(x, a.state["thresholds"])].to(x.dtype)
        step = a.state["step"]
        raised = torch.where(x > 0, torch.maximum(x.float(), step), 0.0)
        return fake_quantize(raised, step, a.state["zero"], a.bits).to(x.dtype)
