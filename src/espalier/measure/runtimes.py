"""An exported file timed beside the model it came from: alternating, warm, threads stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from espalier.core.model import copy_model
from espalier.core.parametrize import plain
from espalier.deploy import runtimes
from espalier.measure.speed import Latency, latency


def runtime_latency(
    model: nn.Module,
    files: Sequence[str | Path],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    repeats: int = 50,
    batch: int = 1,
    seconds: float | None = 20.0,
) -> dict[str, Latency]:
    """Time ``model`` in torch and every file in every installed runtime that reads it, one call of each in turn.

    Names are ``torch`` and ``onnxruntime``, ``openvino``, ``executorch``, with the file's suffix where several files
    meet one runtime. Raises ``NeedError`` where no runtime is installed.
    """
    models: dict[str, nn.Module] = {"torch": plain(copy_model(model)).cpu().eval()}
    for file in files:
        for name, suffixes in runtimes.SUFFIXES.items():
            if Path(file).suffix in suffixes and name in runtimes.available():
                label = name if name not in models else f"{name} ({Path(file).suffix[1:]})"
                models[label] = runtimes.open(file, name, threads=threads).module()
    keywords = dict(kwargs or {})
    return latency(
        models, lambda each: each(*args, **keywords), threads=threads, repeats=repeats, batch=batch, seconds=seconds
    )
