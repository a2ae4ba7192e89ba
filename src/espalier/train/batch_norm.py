r"""Batch-norm statistics estimated again, exactly, over many batches.

Paper    Wu, Johnson. Rethinking "Batch" in BatchNorm. 2021. arXiv:2105.07576
Formula  mean = sum_b n_b mean_b / N;   var = sum_b n_b (var_b + (mean_b - mean)^2) / (N - 1);   N = sum_b n_b
Departs  Unbiased over all samples together, as torch's running variance is over one batch; weights do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import DataError
from espalier.core.fields import Steps
from espalier.core.method import Technique
from espalier.core.model import device_of, evaluating
from espalier.core.task import to_device
from espalier.train.randomness import seeded_epochs

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Moments:
    """Count, mean and summed squared deviation per channel, merged batch by batch in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Merge ``values`` ``(n, channels, ...)``."""
        flat = values.detach().double().transpose(0, 1).flatten(1)
        count, mean = flat.shape[1], flat.mean(dim=1)
        squares = (flat - mean.unsqueeze(1)).square().sum(dim=1)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, apart = self.count + count, mean - self.mean
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NORMS) and isinstance(m.running_mean, Tensor)]


@contextmanager
def _observed(norms: list[nn.Module]) -> Iterator[dict[nn.Module, _Moments]]:
    """The layers normalise by their batch, as in training, and what enters them is measured."""
    moments = {norm: _Moments() for norm in norms}

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
    used = {norm: found for norm, found in moments.items() if found.count > 1}
    for norm, found in used.items():
        assert found.mean is not None and found.squares is not None  # noqa: S101, PT018 - set where count is
        norm.running_mean.copy_(found.mean)  # type: ignore[operator]
        norm.running_var.copy_(found.squares / (found.count - 1))  # type: ignore[operator]
    return len(used)


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Technique):
    """Re-estimates the statistics; ``batches`` ``None``: the whole training set."""

    id: ClassVar[str] = "batch-norm"
    batches: Steps | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Data to measure on."""
        return frozenset({"train"})

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """The model with new statistics; weights untouched."""
        if not reestimate(model, context, self.batches):
            context.skip("(model)", "it has no batch-norm layer with running statistics")
        return model
