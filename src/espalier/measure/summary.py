"""Everything measured about a model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from espalier.core.errors import UsageError
from espalier.core.model import device_of
from espalier.core.parametrize import plain
from espalier.core.record import Counts
from espalier.core.task import Split, Task, capture_call, to_device
from espalier.measure.memory import PeakMemory, peak_memory
from espalier.measure.speed import Latency, latency

Macs = int | Callable[[nn.Module], int]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Bytes of the file, counts, MACs per sample, time, memory, and the metric; None where not measured.

    ``latency`` is at batch 1, ``throughput`` the same timing at a larger batch.
    """

    parameters: int
    nonzero: int
    file_bytes: int | None = None
    macs: int | None = None
    latency: Latency | None = None
    throughput: Latency | None = None
    peak_memory: PeakMemory | None = None
    metric: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; what was not measured is absent."""
        data: dict[str, Any] = {"file_bytes": self.file_bytes, "parameters": self.parameters, "nonzero": self.nonzero}
        data["macs"] = self.macs
        for name in ("latency", "throughput", "peak_memory"):
            part = getattr(self, name)
            data[name] = None if part is None else part.to_json()
        data["metric"] = None if self.metric is None else dict(self.metric)
        return {name: value for name, value in data.items() if value is not None}


def measure(
    model: nn.Module,
    task: Task,
    *,
    split: Split | None = "val",
    original: nn.Module | None = None,
    file_bytes: int | None = None,
    macs: Macs | None = None,
    threads: int = 1,
    batch: int = 64,
    seconds: float = 2.0,
) -> Measurement:
    """Measure one model; :func:`measure_all` says how. ``original`` gives the answers of a task without labels."""
    sizes = {} if file_bytes is None else {"model": file_bytes}
    found = measure_all(
        {"model": model}, task, split=split, original=original, file_bytes=sizes, macs=macs,
        threads=threads, batch=batch, seconds=seconds,
    )  # fmt: skip
    return found["model"]


def measure_all(
    models: Mapping[str, nn.Module],
    task: Task,
    *,
    split: Split | None = "val",
    original: nn.Module | None = None,
    file_bytes: Mapping[str, int] | None = None,
    macs: Macs | Mapping[str, Macs] | None = None,
    threads: int = 1,
    batch: int = 64,
    repeats: int = 30,
    seconds: float = 2.0,
) -> dict[str, Measurement]:
    """Measure models side by side on the task's own data: timings alternate between them in one process.

    Latency is at batch 1, throughput and peak memory at ``batch`` samples made by repeating the first batch;
    ``seconds`` caps each of the two timings (0: no timing). ``macs``: numbers or a function of the model, per sample.
    ``split=None`` leaves the metric out. The models are measured as plain modules and not modified.
    """
    bare = {name: plain(model) for name, model in models.items()}
    example = task.example()
    answers = plain(original) if original is not None else None
    timing = {
        count: _time(bare, task, example, batch=count, threads=threads, repeats=repeats, seconds=seconds)
        for count in (1, batch)
        if seconds > 0
    }
    found = {}
    for name, model in bare.items():
        counts = Counts.of(model)
        metric = None if split is None else _metric(model, task, split, answers)
        given = macs.get(name) if isinstance(macs, Mapping) else macs
        found[name] = Measurement(
            file_bytes=(file_bytes or {}).get(name),
            parameters=counts.parameters,
            nonzero=counts.nonzero,
            macs=given(model) if callable(given) else given,
            latency=timing[1][name] if timing else None,
            throughput=timing[batch][name] if timing else None,
            peak_memory=_memory(model, task, example, batch),
            metric=metric,
        )
    return found


def _time(
    models: Mapping[str, nn.Module], task: Task, example: Any, *, batch: int, threads: int, repeats: int, seconds: float
) -> dict[str, Latency]:
    calls = {id(model): sized_call(task, model, example, batch) for model in models.values()}

    def call(model: nn.Module) -> Any:
        args, kwargs = calls[id(model)]
        return model(*args, **kwargs)

    return latency(models, call, repeats=repeats, threads=threads, batch=batch, seconds=seconds)


def _memory(model: nn.Module, task: Task, example: Any, batch: int) -> PeakMemory:
    args, kwargs = sized_call(task, model, example, batch)
    return replace(peak_memory(model, lambda m: m(*args, **kwargs), (args, kwargs)), batch=batch)


def _metric(model: nn.Module, task: Task, split: Split, original: nn.Module | None) -> dict[str, Any]:
    scorer, score = task.scorer(), task.measure(model, split, original)
    return {
        "name": scorer.name,
        "unit": scorer.unit,
        "higher_is_better": scorer.higher_is_better,
        "value": score.value,
        "stderr": score.stderr,
        "count": score.count,
        "split": split,
    }


def sized_call(task: Task, model: nn.Module, example: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which the task calls the model on ``example``, repeated or cut to ``batch`` samples.

    A tensor belongs to the batch if its first axis is as long as that of the first tensor argument. Raises
    ``UsageError`` where the model gets no tensor with a batch axis.
    """
    call = capture_call(task, model, to_device(example, device_of(model)))
    lengths = [leaf.shape[0] for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim]
    if not lengths or not lengths[0]:
        raise UsageError(
            "timing needs a model called with at least one tensor whose first axis is the batch, of 1 or more."
        )
    length = lengths[0]

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != length:
            return leaf
        return leaf.repeat(-(-batch // length), *[1] * (leaf.ndim - 1))[:batch].clone()  # not a view of more

    args, kwargs = tree_map(fit, call)
    return args, kwargs
