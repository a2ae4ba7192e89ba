"""Paired comparison: the same samples through both models, so that the difference is not lost in the spread.

Paper    McNemar. Note on the sampling error of the difference between correlated proportions. Psychometrika 1947.
         Dietterich. Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms. 1998.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.errors import DataError
from espalier.core.metric import Agreement, Metric
from espalier.core.model import device_of, evaluating
from espalier.core.task import Split, Task, to_device


@dataclass(frozen=True)
class Paired:
    """``drop``: how much worse the second model is, in the metric's unit (negative: better), over ``count`` samples.

    ``low``/``high``: 95 % bootstrap interval of the drop; ``stderr``: its standard error. ``lost`` samples came out
    worse than before, ``gained`` better. ``p``: exact two-sided McNemar (sign) probability of a split of
    ``lost + gained`` at least this uneven if neither model were better.
    """

    drop: float
    stderr: float
    low: float
    high: float
    lost: int
    gained: int
    count: int
    p: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def paired(original: nn.Module, compressed: nn.Module, task: Task, split: Split = "val") -> Paired:
    """Compare two models sample by sample on a split, each batch read once for both.

    Raises ``DataError`` for a split without samples, ``NeedError`` for one that is not given.
    """
    metric = task.scorer()
    before: list[Tensor] = []
    after: list[Tensor] = []
    with ExitStack() as stack:
        for model in (original, compressed):
            stack.enter_context(evaluating(model))
        for batch in task.data(split):
            outputs = [task.predict(model, to_device(batch, device_of(model))) for model in (original, compressed)]
            target = outputs[0] if isinstance(metric, Agreement) else task.target(batch)
            for values, output in zip((before, after), outputs, strict=True):
                values.append(_per_sample(metric, output, target))
    if not before:
        raise DataError(f"{split} gave no batch to compare the models on.")
    sign = 1.0 if metric.higher_is_better else -1.0
    drops = sign * (torch.cat(before) - torch.cat(after))
    return summarise(drops.numpy())


def _per_sample(metric: Metric, output: Any, target: Any) -> Tensor:
    running = metric.fresh()
    target = to_device(target, _device(output))
    running.update(output, target)  # its checks, with its messages
    return metric.per_sample(output, target).detach().double().cpu()


def _device(output: Any) -> torch.device:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if hasattr(output, "values") else output))
    return output.device


def summarise(drops: np.ndarray[Any, np.dtype[np.float64]], resamples: int = 4000) -> Paired:
    """Mean, standard error, bootstrap interval and sign test of per-sample drops ``(n,)``; seeded, so repeatable."""
    count = len(drops)
    mean = float(drops.mean())
    stderr = float(drops.std(ddof=1) / count**0.5) if count > 1 else 0.0
    values, tally = np.unique(drops, return_counts=True)
    # resampling n samples with replacement = drawing how often each distinct value comes
    draws = np.random.default_rng(0).multinomial(count, tally / count, size=resamples)
    low, high = np.quantile(draws @ values / count, (0.025, 0.975))
    lost, gained = int((drops > 0).sum()), int((drops < 0).sum())
    return Paired(mean, stderr, float(low), float(high), lost, gained, count, sign_test(lost, gained))


def sign_test(lost: int, gained: int) -> float:
    """Exact two-sided probability that ``lost + gained`` fair coins fall at least this unevenly."""
    trials, term, total = lost + gained, 1, 0
    for k in range(min(lost, gained) + 1):
        total += term
        term = term * (trials - k) // (k + 1)
    return min(1.0, float(Fraction(2 * total, 2**trials)))
