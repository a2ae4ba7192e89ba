"""A model as an int8 file: written for a runtime, run, compared, measured, and timed beside fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.core.errors import ModelError, NeedError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from espalier.cli.project import Project
    from espalier.core.task import Task
    from espalier.deploy.int8 import Int8Exported
    from espalier.quantize.parts import Observer

CALIBRATION = 300
"""Samples that calibrate what no training has fixed: as many as the usual tools take."""
LARGEST_DROP = 0.003
"""Of the metric's value: a file that is further below the quantized model in torch is not kept."""
Tell = Callable[[str, int, int], None]


def export_int8(
    model: nn.Module,
    project: Project,
    out: Path,
    runtime: str | None,
    *,
    threads: int = 1,
    keep_fp32: Sequence[str] = (),
    observer: Observer | None = None,
    progress: Tell | None = None,
) -> dict[str, Any]:
    """Write, run, compare and time; everything as plain data. ``model``: with its codes, where it has some."""
    from espalier import deploy
    from espalier.deploy.int8 import MinMax, to_int8

    task = project.task
    runtime = runtime or next((name for name in ("openvino", "onnxruntime") if name in deploy.available()), None)
    if runtime is None:
        raise NeedError("the int8 export needs a runtime that runs it: pip install 'espalier[deploy]'.")
    check_runtime(runtime)
    path = out if out.suffix else out / ("model.int8.xml" if runtime == "openvino" else "model.int8.onnx")
    done = to_int8(
        model, task, calls(task, model), path, runtime=runtime, reference=project.model, keep_fp32=tuple(keep_fp32),
        observer=MinMax if observer is None else observer.streaming, progress=progress,
    )  # fmt: skip
    found: dict[str, Any] = {**done.to_json(), "to": "int8", "said": str(done.coverage), "notes": list(done.notes)}
    if task.train is None:
        found["notes"].append("there is no training data: what has no range yet was calibrated on val")
    if runtime in deploy.available():
        if task.val is not None:
            found["metric"] = measured(project.model, model, task, done, threads)
        found["latency"] = timed(project.model, task, done.path, runtime, threads)
    return found


def check_runtime(runtime: str) -> None:
    """Raise ``UsageError`` for a runtime that no rules are known of, ``NeedError`` for one that is not installed."""
    from espalier.deploy.installed import need
    from espalier.deploy.int8.profile import PROFILES

    if runtime not in PROFILES:
        raise UsageError(f"--runtime {runtime!r} is not one.{did_you_mean(runtime, PROFILES)}")
    if runtime != "tensorrt":
        need(f"an int8 file for {runtime}", runtime)


def calls(task: Task, model: nn.Module) -> Iterator[Any]:
    """Calibration batches, as the model is called on them: training data, some hundred samples."""
    from espalier.core.task import capture_call

    data = task.train if task.train is not None else task.val
    if data is None:
        raise NeedError("the int8 export calibrates on training data, and the task has none: give Task(train=...).")
    seen = 0
    for batch in islice(iter(data), CALIBRATION):
        args, kwargs = capture_call(task, model, batch)
        if kwargs and args:
            raise UsageError(
                "the model is called with positional and keyword arguments at once; give Task(predict=...) that uses "
                "one kind."
            )
        first = next(iter((*args, *kwargs.values())))
        yield kwargs or args
        seen += len(first)
        if seen >= CALIBRATION:
            return


def timed(original: nn.Module, task: Task, path: Path, runtime: str, threads: int) -> dict[str, Any]:
    """Milliseconds at batch 1: torch and the runtime in fp32, bf16 where it has it, and the int8 file, in turn."""
    from espalier import deploy
    from espalier.core.model import copy_model
    from espalier.core.parametrize import plain
    from espalier.deploy.check import resized
    from espalier.deploy.export import example_call
    from espalier.measure.speed import latency

    bare = plain(copy_model(original)).cpu().eval()
    args, kwargs = resized(example_call(bare, task), 1)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / ("model.xml" if path.suffix == ".xml" else "model.onnx")
        (deploy.to_openvino if path.suffix == ".xml" else deploy.to_onnx)(bare, task, fp32)
        models: dict[str, nn.Module] = {
            "torch": bare, f"{runtime}, fp32": deploy.open(fp32, runtime, threads=threads).module(),
        }  # fmt: skip
        if runtime == "openvino":
            models[f"{runtime}, bf16"] = deploy.open(fp32, runtime, threads=threads, precision="bf16").module()
        models[f"{runtime}, int8"] = deploy.open(path, runtime, threads=threads).module()
        rows = latency(models, lambda m: m(*args, **kwargs), threads=threads, repeats=50, batch=1, seconds=20.0)
    return {name: row.to_json() for name, row in rows.items()}


def measured(original: nn.Module, model: nn.Module, task: Task, done: Int8Exported, threads: int) -> dict[str, Any]:
    """The metric on val of the original, of the model as it is in torch, and of the file.

    Raises ``ModelError`` and deletes the file where it is worse than the model in torch by more than ``LARGEST_DROP``
    of the value and the standard error.
    """
    from espalier import deploy

    file = deploy.open(done.path, done.runtime, threads=threads).module()
    metric, name = task.scorer(), f"{done.runtime}, int8"
    found = {
        key: task.measure(candidate, "val", original)
        for key, candidate in {"fp32": original, "in torch": model, name: file}.items()
    }
    torch, here = found["in torch"], found[name]
    if metric.drop(torch, here) > max(LARGEST_DROP * abs(torch.value), torch.stderr):
        for each in done.files:
            (done.path.parent / each).unlink(missing_ok=True)
        raise ModelError(
            f"{metric.name} on val is {here} in the int8 file and {torch} in torch: the file computes something else, "
            "so it was not kept. Try --observer mse or percentile, leave layers in fp32 by --keep-fp32, or use another "
            "runtime."
        )
    return {"name": metric.name, **{key: score.value for key, score in found.items()}, "stderr": found["fp32"].stderr}
