"""Speed: seconds of a forward pass, warm, alternating between the models compared, threads stated."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from espalier.core.errors import UsageError
from espalier.core.model import device_of, evaluating


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 10th and 90th percentile over ``runs``; samples per second at the median."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    per_second: float
    runs: int
    batch: int
    threads: int

    @classmethod
    def of(cls, seconds: list[float], *, batch: int, threads: int) -> Latency:
        """Summarise call times in seconds."""
        median = statistics.median(seconds)
        p10, p90 = quantile(seconds, 0.1), quantile(seconds, 0.9)
        rate = batch / median if median > 0 else float("inf")
        return cls(median * 1e3, p10 * 1e3, p90 * 1e3, rate, len(seconds), batch, threads)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def quantile(values: list[float], fraction: float) -> float:
    """The ``fraction`` quantile, 0..1, linear between order statistics."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latency(
    models: Mapping[str, nn.Module],
    call: Callable[[nn.Module], Any],
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int = 1,
    batch: int = 1,
    seconds: float | None = None,
) -> dict[str, Latency]:
    """Time ``call(model)`` in eval mode without gradients, one call of each model in turn (A B A B ...).

    ``warmup`` rounds are not counted; ``batch`` is the number of samples one call processes; after ``seconds``,
    counted from the first counted round, no new round starts (at least three are made). torch's thread count is
    ``threads`` meanwhile and put back; an accelerator is synchronised before every reading of the clock.
    Raises ``UsageError`` for counts below 1.
    """
    counts = {"repeats": repeats, "threads": threads, "batch": batch}
    bad = [f"{name}={value!r}" for name, value in counts.items() if value < 1]
    if bad or warmup < 0 or not models:
        raise UsageError(
            f"latency needs at least one model, repeats, threads and batch of 1 or more, and warmup of 0 or more; got "
            f"{len(models)} models, {', '.join(bad) or f'warmup={warmup!r}'}."
        )
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        for _ in range(warmup):
            for model in models.values():
                _timed(call, model)
        stack.enter_context(_no_collection())
        start = time.perf_counter()
        for done in range(repeats):
            if seconds is not None and done >= 3 and time.perf_counter() - start >= seconds:
                break
            for name, model in models.items():
                times[name].append(_timed(call, model))
    return {name: Latency.of(values, batch=batch, threads=threads) for name, values in times.items()}


def _timed(call: Callable[[nn.Module], Any], model: nn.Module) -> float:
    device = device_of(model)
    _synchronise(device)
    start = time.perf_counter()
    call(model)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection inside one model's turn would be charged to it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
