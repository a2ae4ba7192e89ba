r"""Exponential moving average of the weights: what is judged and handed back is their mean over the last steps.

Paper    Tarvainen, Valpola. Mean teachers are better role models. NeurIPS 2017. arXiv:1703.01780; Polyak, Juditsky.
         Acceleration of Stochastic Approximation by Averaging. SIAM J. Control Optim. 30, 1992
Formula  w'_0 = w_0;   w'_t = a_t w'_{t-1} + (1 - a_t) w_t after every step,   a_t = min(decay, t / (t + 1))
Departs  Only the average is taken from the paper, not its consistency loss. decay = 1 is the plain mean of all steps
         (Polyak and Ruppert). The running statistics of batch norms are averaged with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.fields import Fraction
from espalier.core.method import Method
from espalier.train.moments import NORMS


@dataclass(frozen=True, kw_only=True)
class EMA(Method):
    """``decay``: how much of the average stays in every step once there have been ``1 / (1 - decay)`` of them.

    Latent tensors of masks, shared and quantized weights are averaged, and what is learned beside them; all other
    buffers (masks, indices, scales that are no parameters) are those of the last step. A weight is zero in the average
    only where a mask says so: the zeros of an L1 penalty need a step that fixes them.
    """

    id: ClassVar[str] = "ema"
    kind: ClassVar[str] = "averaging"
    decay: Fraction = 0.999

    def kept(self, step: int) -> float:
        """``a_t`` of step ``t`` (from 1)."""
        return min(self.decay, step / (step + 1))


class Average(Callback):
    """Follows the weights of a running loop. A tensor that appears, or changes its shape, starts its average anew."""

    def __init__(self, part: EMA) -> None:
        self.part = part
        self.means: dict[str, Tensor] = {}

    def on_start(self, loop: Loop) -> None:
        """Begin at the weights as they are, unless a resume has brought averages."""
        self.follow(loop.model, 0.0 if not self.means else 1.0)

    def after_step(self, loop: Loop) -> None:
        """One step of the recursion."""
        self.follow(loop.model, self.part.kept(loop.step + 1))

    @torch.no_grad()
    def follow(self, model: nn.Module, kept: float) -> None:
        """``kept`` of the averages stays, the rest comes from the model."""
        means, before = {}, self.means
        for name, value in averaged(model).items():
            now = value.detach().to(torch.promote_types(value.dtype, torch.float32)).contiguous()
            mean = before.get(name)
            if mean is None or mean.shape != now.shape:
                mean = now.clone()
            elif kept < 1:
                mean = mean.to(now.device).lerp_(now, 1 - kept)
            means[name] = mean
        self.means = means

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averages; its own weights are put back."""
        own = {name: value.detach().clone() for name, value in averaged(model).items()}
        self.hand_over(model)
        try:
            yield
        finally:
            self._put(model, own)

    def hand_over(self, model: nn.Module) -> None:
        """Give the model the averages."""
        self.follow(model, 1.0)
        self._put(model, self.means)

    @torch.no_grad()
    def _put(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, tensor in averaged(model).items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What is averaged: every trainable parameter, latent tensors among them, and batch norms' running statistics."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, norm in model.named_modules():
        for name in ("running_mean", "running_var") if isinstance(norm, NORMS) else ():
            statistic = getattr(norm, name)
            if isinstance(statistic, Tensor):
                found[f"{path}.{name}" if path else name] = statistic
    return found
