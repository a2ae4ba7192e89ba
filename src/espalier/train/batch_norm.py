r"""Batch norms put in, estimated again, or folded away.

Paper    Ioffe, Szegedy. Batch Normalization. ICML 2015. arXiv:1502.03167; Wu, Johnson. Rethinking "Batch" in BatchNorm.
         2021. arXiv:2105.07576
Formula  mean = sum_b n_b mean_b / N;   var = sum_b n_b (var_b + (mean_b - mean)^2) / (N - 1);   N = sum_b n_b
         insert: y = g (x - mean) / sqrt(var + eps) + b,   g = sqrt(var + eps), b = mean, so that y = x in use
         fold: W <- g W / sqrt(var + eps),   c <- g (c - mean) / sqrt(var + eps) + b
Departs  Unbiased over all samples together, as torch's running variance is over one batch. A norm goes behind a layer
         of a trained network, whose function it keeps; the paper trains with it from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import DataError
from espalier.core.fields import Steps
from espalier.core.method import Technique
from espalier.core.model import device_of, evaluating
from espalier.core.task import to_device
from espalier.train.moments import NORMS, Moments
from espalier.train.norm_folding import fold_norms
from espalier.train.norm_insertion import insert_norms
from espalier.train.randomness import seeded_epochs


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NORMS) and isinstance(m.running_mean, Tensor)]


@contextmanager
def _observed(norms: list[nn.Module]) -> Iterator[dict[nn.Module, Moments]]:
    """The layers normalise by their batch, as in training, and what enters them is measured."""
    moments = {norm: Moments() for norm in norms}

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        moments[norm].add(args[0])

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def reestimate(model: nn.Module, context: Context, batches: int | None = None) -> int:
    """Set every BN layer's statistics to those of its inputs over the first ``batches`` training batches (all: None).

    BN layers normalise by the batch meanwhile, the rest of the model is in eval mode (no dropout). Returns the
    number of layers set; 0 leaves the model as it was. Raises ``DataError`` for a loader without batches.
    """
    norms = _norms(model)
    if not norms:
        return 0
    loader, device = context.data.data("train"), device_of(model)
    done = 0
    with evaluating(model), _observed(norms) as moments, seeded_epochs(context, "reestimate", loader) as begin:
        begin(0)
        for batch in loader:
            context.data.predict(model, to_device(batch, device))
            done += 1
            if done == batches:
                break
    if not done:
        raise DataError("the train loader gave no batch; re-estimating BN statistics needs at least one.")
    return sum(found.put_into(norm) for norm, found in moments.items())


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Technique):
    """``mode``: ``re-estimate`` the statistics, ``insert`` norms that change nothing yet, or ``fold`` those there are.

    ``batches``: training batches to measure on, None for all. ``layers``: which linear layers and convolutions get a
    norm, or have the one behind them folded into them; ``*`` are all but those that give the model's answer.
    """

    id: ClassVar[str] = "batch-norm"
    mode: Literal["re-estimate", "insert", "fold"] = "re-estimate"
    batches: Steps | None = None
    layers: tuple[str, ...] = ("*",)

    @property
    def needs(self) -> frozenset[str]:
        """Data to measure on."""
        return frozenset() if self.mode == "fold" else frozenset({"train"})

    def conflicts(self) -> list[str]:
        """Fields without a say."""
        found = []
        if self.mode == "fold" and self.batches is not None:
            found.append("mode=fold measures nothing: leave batches unset")
        if self.mode == "re-estimate" and self.layers != ("*",):
            found.append("mode=re-estimate is for all batch norms together: leave layers unset")
        return found

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """The model with new statistics, with norms more or with norms less; its function is otherwise the same."""
        if self.mode == "insert":
            return insert_norms(model, self.layers, context, self.batches, self.name)
        if self.mode == "fold":
            return fold_norms(model, self.layers, context, self.name)
        if not reestimate(model, context, self.batches):
            context.skip("(model)", "it has no batch-norm layer with running statistics")
        return model
