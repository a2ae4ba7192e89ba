"""``espalier export``: a model for another runtime; the written file is run, compared and timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.cli import int8
from espalier.cli.int8 import export_int8
from espalier.core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from espalier.cli.project import Project
    from espalier.deploy import Exported

FORMATS = {
    "onnx": "model.onnx", "openvino": "model.xml", "executorch": "model.pte", "safetensors": "model.safetensors",
}  # fmt: skip
IN_16_BITS = ("onnx", "openvino", "safetensors")


def export(
    source: Path,
    to: str,
    out: Path | None,
    project: Path | None,
    *,
    threads: int,
    tolerance: float,
    weights: str = "fp32",
    runtime: str | None = None,
    keep_fp32: list[str] | None = None,
    observer: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Write, run, compare and time; everything as plain data."""
    from espalier import deploy
    from espalier.cli.project import load_project
    from espalier.deploy.sixteen_bits import check_weights

    if to not in (*FORMATS, "int8"):
        allowed = (*FORMATS, "int8")
        raise UsageError(f"--to {to!r} is not a format.{did_you_mean(to, allowed)} Allowed: {', '.join(allowed)}.")
    if (runtime is not None or keep_fp32 or observer is not None) and to != "int8":
        raise UsageError("--runtime, --keep-fp32 and --observer are about an int8 file; give --to int8.")
    check_weights(weights)
    if weights != "fp32" and to not in IN_16_BITS:
        raise UsageError(f"--weights {weights} is for {', '.join(IN_16_BITS)}; a file for {to} has a form of its own.")
    if runtime is not None:
        int8.check_runtime(runtime)
    model, loaded = _load(source, project, codes=to in ("int8", "executorch"))
    if loaded is None and project is not None:
        loaded = load_project(project)
    task = loaded.task if loaded is not None else None
    if to == "int8":
        if loaded is None:
            raise UsageError("--to int8 calibrates on data: name the project file, --project project.py.")
        folder = out or (source if source.is_dir() else source.parent)
        from espalier.cli.quantize import observer_of

        return export_int8(
            model, loaded, folder, runtime, keep_fp32=keep_fp32 or (), threads=threads, observer=observer_of(observer),
            progress=progress,
        )  # fmt: skip
    path = out or _beside(source, to)
    if to == "safetensors":
        return {"to": to, **deploy.to_safetensors(model, path, weights=weights).to_json()}
    example: Any = task if task is not None else None
    if to == "executorch":
        data = int8.calls(task, model) if task is not None and (task.train or task.val) is not None else None
        done = deploy.to_executorch(model, example, path, calibration=data, tolerance=tolerance, progress=progress)
    else:
        write = deploy.to_onnx if to == "onnx" else deploy.to_openvino
        done = write(model, example, path, weights=weights, tolerance=tolerance, progress=progress)
    found: dict[str, Any] = {"to": to, **done.to_json()}
    found["latency"] = _latency(model, example, done, threads)
    if task is not None and task.val is not None:
        name = "onnxruntime" if to == "onnx" else to
        if name in deploy.available():
            scores = [task.measure(m, "val", model) for m in (model, deploy.open(path, name, threads=threads).module())]
            found["metric"] = {"name": task.scorer().name, "torch": scores[0].value, name: scores[1].value,
                               "stderr": scores[0].stderr}  # fmt: skip
    return found


def _load(source: Path, project: Path | None, *, codes: bool = False) -> tuple[nn.Module, Project | None]:
    from espalier.cli.project import load_project, load_result

    if source.is_dir():
        file = source / "model.espalier"
        if not file.is_file():
            raise UsageError(f"{source} has no model.espalier; give a finished run, an .espalier file or a project.py.")
        return load_result(file, project, codes=codes)
    if source.suffix == ".py":
        found = load_project(source)
        return found.model, found
    if source.suffix == ".espalier":
        return load_result(source, project, codes=codes)
    raise UsageError(f"{source} is neither a run directory, an .espalier file nor a project file (.py).")


def _beside(source: Path, to: str) -> Path:
    return (source if source.is_dir() else source.parent) / FORMATS[to]


def _latency(model: nn.Module, example: Any, done: Exported, threads: int) -> dict[str, Any]:
    from espalier.core.model import copy_model
    from espalier.core.parametrize import plain
    from espalier.deploy.check import resized
    from espalier.deploy.export import example_call
    from espalier.measure.runtimes import runtime_latency

    call = example_call(plain(copy_model(model)).cpu().eval(), example)
    args, kwargs = resized(call, 1) if done.free_batch else call
    timed = runtime_latency(model, [done.path], args, kwargs, threads=threads)
    return {name: row.to_json() for name, row in timed.items()}


def lines(found: dict[str, Any]) -> list[str]:
    """What a person reads."""
    if found["to"] == "int8":
        from espalier.report.int8 import int8 as said_of

        return list(said_of(found))
    said = [f"{name}: {size:,} bytes" for name, size in found["files"].items()]
    stored = found.get("weights", "fp32")
    whose = "the model's" if stored == "fp32" else f"what its weights, rounded to {stored}, give in fp32"
    said += [
        f"{check['runtime']}, batch {check['batch']}: outputs within {check['difference']:.1e} of {whose}"
        for check in found.get("checks", ())
    ]
    if "metric" in found:
        metric = dict(found["metric"])
        name, error = metric.pop("name"), metric.pop("stderr")
        said.append(f"{name} on val: " + ", ".join(f"{k} {v:.2f}" for k, v in metric.items()) + f" (+- {error:.2f})")
    for name, row in found.get("latency", {}).items():
        said.append(
            f"{name:<12} {row['median_ms']:8.3f} ms ({row['p10_ms']:.3f} to {row['p90_ms']:.3f})   "
            f"{row['threads']} thread{'s' * (row['threads'] > 1)}, batch {row['batch']}, {row['runs']} runs in turn"
        )
    said += list(found.get("notes", ()))
    return said
