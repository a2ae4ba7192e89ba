r"""SynFlow: without data, the connections stay through which most synaptic flow passes; no layer is cut off.

Paper    Tanaka, Kunin, Yamins, Ganguli. Pruning neural networks without any data by iteratively conserving synaptic
         flow. NeurIPS 2020. arXiv:2006.05467
Formula  R = 1^T (prod_l |w_l|) 1;   s = w dR/dw;   in round k of n the top (1 - sparsity)^(k / n) stay
Departs  R is the sum of the model's outputs for inputs of ones, all parameters and statistics made positive;
         the product where activations pass what is positive, as ReLU does. Token ids are those of the data's first
         sample. A layer that takes the mean off its input (LayerNorm) stops the flow; what lies before it scores 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from espalier.core.context import Context
from espalier.core.errors import EspalierError, ModelError
from espalier.core.fields import Rounds
from espalier.core.metric import first_tensor
from espalier.core.model import copy_model, device_of
from espalier.core.parametrize import slots
from espalier.core.selection import Selection
from espalier.core.task import to_device
from espalier.prune.connections import Connections, lowest_removed
from espalier.train.looking import connected, derivative, finite, looking


def ones(batch: Any) -> Any:
    """The first sample of a batch with every number in it replaced by 1; whole numbers (token ids) stay."""

    def one(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        item = item[:1] if item.ndim else item
        return torch.ones_like(item, dtype=torch.float64) if item.is_floating_point() else item

    return _pytree.tree_map(one, batch)


@dataclass(frozen=True, kw_only=True)
class SynFlow(Connections):
    """Synaptic flow, in ``rounds`` rounds; of the data only the shape of an input is used."""

    id: ClassVar[str] = "synflow"
    rounds: Rounds = 100

    @property
    def needs(self) -> frozenset[str]:
        """Something that has the shape of an input."""
        return frozenset({"train"})

    def kept(self, model: nn.Module, selection: Selection, sparsity: float, context: Context) -> dict[str, Tensor]:
        positive = copy_model(model).double()  # products over many layers leave the range of float32
        with torch.no_grad():
            for tensor in (*positive.parameters(), *positive.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        weights = {name: slot.latent for name, slot in slots(positive).items() if name in selection.names}
        full = {name: weight.detach().clone() for name, weight in weights.items()}
        stays = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in full.items()}
        batch = to_device(ones(context.data.example()), device_of(positive))
        for weight in weights.values():
            weight.requires_grad_()
        for turn in range(1, self.rounds + 1 if weights else 1):
            found = self.scores(positive, weights, batch, context)
            scores = {name: score.masked_fill(~stays[name], -torch.inf) for name, score in found.items()}
            stays = lowest_removed(scores, 1 - (1 - sparsity) ** (turn / self.rounds))
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(full[name] * stays[name])
            context.progress("synaptic flow", turn, self.rounds)
        return stays

    def scores(
        self, positive: nn.Module, weights: dict[str, nn.Parameter], batch: Any, context: Context
    ) -> dict[str, Tensor]:
        """w dR/dw of the positive copy."""
        with looking(positive, context):
            try:
                output = first_tensor(context.data.predict(positive, batch))
            except EspalierError:
                raise
            except Exception as error:
                raise ModelError(
                    f"the model does not run on inputs of ones in float64 ({type(error).__name__}: {error}), which "
                    "synflow needs. Use connections snip or grasp."
                ) from error
            flow = output.sum()
            connected(flow)
            grads = derivative(flow, list(weights.values()))
        pairs = zip(weights.items(), grads, strict=True)
        return {name: finite(name, weight.detach() * grad) for (name, weight), grad in pairs}
