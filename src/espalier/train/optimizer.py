r"""Stochastic gradient descent with momentum.

Paper    Sutskever, Martens, Dahl, Hinton. On the importance of initialization and momentum in deep learning. ICML 2013.
Formula  g <- g + weight_decay w;   v <- momentum v + g;   w <- w - lr v;   nesterov: w <- w - lr (g + momentum v)
Departs  The learning rate stands outside the velocity (torch's form), so a schedule acts at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.core.errors import UsageError
from espalier.core.fields import Momentum, Penalty
from espalier.core.method import Method
from espalier.core.quantized import State

LEARNING_RATE = 1e-3
Parameters = list[nn.Parameter] | list[dict[str, Any]]
"""What torch's optimizers take: parameters, or groups of them with options of their own."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that are not frozen, each once. Raises ``UsageError`` where there is none."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(
            f"{type(model).__name__} has nothing to train: all its parameters are frozen. "
            "Call .requires_grad_(True) on those that should learn, or leave the training step out."
        )
    return found


def backend(parameters: list[nn.Parameter]) -> dict[str, bool]:
    """The fastest of torch's equal implementations: one fused kernel where every layout is the plain one.

    The fused CPU kernels walk raw memory and pair up the wrong elements of a weight, its gradient and its state
    whose strides differ (tried with torch 2.13), hence channels-last weights take the multi-tensor form.
    """
    plain = all(p.is_floating_point() and p.is_contiguous() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if plain else {"foreach": True}


def same_layout(parameters: list[nn.Parameter]) -> None:
    """Give every gradient the strides of its parameter, which the fused optimizers take for granted."""
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(grad)


@dataclass(frozen=True, kw_only=True)
class Optimizer(Method):
    """How gradients become steps. Subclasses give ``create``."""

    kind: ClassVar[str] = "optimizer"

    @abstractmethod
    def create(self, parameters: Parameters, lr: float, **backend: Any) -> torch.optim.Optimizer:
        """The torch optimizer over ``parameters``."""

    def over(self, model: nn.Module, lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
        """The torch optimizer over what is trainable in ``model``: weight decay, except on the state of quantizers.

        A step size or a bound that decays towards zero is no weaker weight but another grid.
        """
        listed = trainable(model)
        state = {id(p) for module in model.modules() if isinstance(module, State) for p in module.parameters()}
        free = [parameter for parameter in listed if id(parameter) in state]
        if not free:
            return self.build(listed, lr)
        decayed = [parameter for parameter in listed if id(parameter) not in state]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        return self.create(groups, lr, **backend(listed))

    def build(self, parameters: Iterable[nn.Parameter], lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
        """The torch optimizer over ``parameters`` in its fastest implementation."""
        listed = list(parameters)
        return self.create(listed, lr, **backend(listed))


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent with (Nesterov) momentum; ``weight_decay`` is added to the gradient."""

    id: ClassVar[str] = "sgd"
    momentum: Momentum = 0.9
    nesterov: bool = False
    weight_decay: Penalty = 0.0

    def conflicts(self) -> list[str]:
        """Nesterov's look-ahead needs a velocity."""
        return ["nesterov needs momentum above 0"] if self.nesterov and not self.momentum else []

    def create(self, parameters: Parameters, lr: float, **backend: Any) -> torch.optim.Optimizer:
        """``torch.optim.SGD``."""
        return torch.optim.SGD(
            parameters, lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay, **backend
        )
