"""What ``inspect``, ``bench``, ``info`` and ``methods`` show, as plain data and as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from espalier.cli.project import Project, load_project, load_result
from espalier.core.errors import ModelError, UsageError
from espalier.core.method import Method, fields_of

if TYPE_CHECKING:
    from torch import nn

    from espalier.core.task import Task


def describe(project: Project, quantization: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Layers, counts, MACs, fp32 length and the metric on val of a project's model.

    ``quantization``: bits (``4``, or ``4/8`` with those of the inputs) at which each layer's sensitivity is measured;
    an analysis that is stopped goes on in the folder ``out``.
    """
    from espalier.core.parametrize import slots
    from espalier.measure import fp32_safetensors_bytes
    from espalier.runs.summary import readable_bytes

    model, task = project.model, project.task
    per_weight, total = _macs(model, task)
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "type": type(slot.module).__name__,
            "shape": list(slot.shape),
            "parameters": slot.latent.numel(),
            "nonzero": int((slot.value() != 0).sum()),
            "macs": per_weight.get(name),
            "trainable": slot.latent.requires_grad,
            "tied": slot.names[1:],
        }
        for name, slot in slots(model).items()
    ]
    length = fp32_safetensors_bytes(model)
    parameters = sum(layer["parameters"] for layer in layers)
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": parameters,
        "fp32_bytes": length,
        "macs": total,
        "layers": layers,
    }
    lines = [
        f"{parameters:,} parameters, {readable_bytes(length)} as fp32 safetensors"
        + (f", {total:,} MACs per sample" if total else "")
    ]
    if task.val is not None:
        metric, score = task.scorer(), task.measure(model, "val", model)
        found["metric"] = {"name": metric.name, "unit": metric.unit, "split": "val", **vars(score)}
        lines.append(f"{metric.name} on val: {score} {metric.unit} ({score.count} samples)")
    if quantization is not None:
        found["quantization"] = measured = sensitivity(project, quantization, out)
        rows = {row["name"]: row for row in measured["layers"]}
        for layer in layers:
            layer["quantization"] = rows.get(layer["name"])
        lines.append(
            f"{measured['metric']} on {measured['split']} with all layers in {quantization} bits: "
            f"{measured['all']:.2f} {measured['unit']} (one on: that layer alone; one off: all but that layer)"
        )
    return {**found, "summary": lines}


def sensitivity(project: Project, quantization: str, out: Path | None) -> dict[str, Any]:
    """The metric with each layer alone quantized and with all but it, as plain data. Raises ``UsageError``."""
    from espalier.core.context import Context
    from espalier.quantize import AffineInput, Quantize
    from espalier.quantize.analysis import analyse
    from espalier.runs.checkpoint import EpochFile

    weights, slash, inputs = quantization.partition("/")
    if not weights.isdigit() or (slash and not inputs.isdigit()):
        raise UsageError(
            f"--quantization {quantization!r} is not understood: write bits of the weights, as in 4, or of weights and "
            "inputs, as in 4/8."
        )
    step = Quantize(bits=int(weights), ends="same")
    if slash:
        step = step.replace(activations=AffineInput(), activation_bits=int(inputs))
    context = Context(task=project.task, models={"original": project.model})
    store = EpochFile(out / "quantization.part") if out is not None else None
    return analyse(project.model, context, step, store=store)


def _macs(model: nn.Module, task: Task) -> tuple[dict[str, int], int | None]:
    from espalier.core.parametrize import plain
    from espalier.core.task import capture_call
    from espalier.graph import macs, trace

    bare = plain(model)
    args, kwargs = capture_call(task, bare, task.example())
    try:
        counted = macs(trace(bare, args, kwargs))
    except ModelError as error:
        from espalier.core.context import Context

        Context().warn(f"no MACs: {error}")
        return {}, None
    return dict(counted.tensors), counted.total


def table(found: dict[str, Any]) -> Table:
    """The layers as a table."""
    view = Table(title=found["model"], title_justify="left")
    for column, side in (
        ("weight", "left"),
        ("layer", "left"),
        ("shape", "left"),
        ("parameters", "right"),
        ("zeros", "right"),
        ("MACs", "right"),
        *((("one on", "right"), ("one off", "right")) if "quantization" in found else ()),
    ):
        view.add_column(column, justify="right" if side == "right" else "left")
    for layer in found["layers"]:
        zeros = 1 - layer["nonzero"] / max(1, layer["parameters"])
        macs = f"{layer['macs']:,}" if layer["macs"] else ""
        shape = " x ".join(map(str, layer["shape"])) or "scalar"
        row = layer.get("quantization")
        cells = (f"{row['on']:.2f}", f"{row['off']:.2f}") if row else ()
        view.add_row(layer["name"], layer["type"], shape, f"{layer['parameters']:,}", f"{zeros:.1%}", macs, *cells)
    return view


def file_table(found: dict[str, Any]) -> Table:
    """Where the bytes of a file are."""
    view = Table(title=f"{found['total']:,} bytes", title_justify="left")
    kinds = ("values", "positions", "codebooks", "floats")
    for column in ("tensor", "shape", "form", "coder", *kinds, "bytes"):
        view.add_column(column, justify="left" if column in ("tensor", "shape", "form", "coder") else "right")
    for tensor in found["tensors"]:
        split = tensor["bytes"]
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        cells = [f"{split[kind]:,}" if split.get(kind) else "" for kind in kinds]
        view.add_row(tensor["name"], shape, tensor["kind"], tensor["coder"], *cells, f"{sum(split.values()):,}")
    for part in ("graph", "header", "prefix"):
        view.add_row(f"[{part}]".replace("[", "\\["), "", "", "", "", "", "", "", f"{found.get(part, 0):,}")
    return view


def bench(run: Path, project: Path | None, *, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    """Latency at batch 1 and throughput at ``batch`` of the file in ``run``, beside the original of ``project``."""
    from espalier.measure import latency
    from espalier.measure.summary import sized_call

    file = run / "model.espalier" if run.is_dir() else run
    if not file.is_file():
        raise UsageError(f"there is no file {file}; give a run directory or an .espalier file.")
    model, loaded = load_result(file, project)
    models: dict[str, nn.Module] = {"compressed": model}
    if project is not None:
        loaded = loaded or load_project(project)
        task = loaded.task
        models = {"original": loaded.model, **models}
    else:
        task = _random_task(models["compressed"])
    rows: dict[str, Any] = {name: {} for name in models}
    for label, count in (("latency", 1), ("throughput", batch)):
        calls = {id(model): sized_call(task, model, task.example(), count) for model in models.values()}
        timed = latency(
            models, lambda model: model(*calls[id(model)][0], **calls[id(model)][1]),  # noqa: B023 - used at once
            repeats=repeats, threads=threads, batch=count,
        )  # fmt: skip
        for name, result in timed.items():
            rows[name][label] = result.to_json()
    return rows


def _random_task(model: nn.Module) -> Task:
    """A task of one random batch that fits the inputs of a re-loaded graph."""
    import torch

    from espalier.core.task import Task
    from espalier.graph import Runner, Value
    from espalier.graph.trees import fill

    if not isinstance(model, Runner):
        raise UsageError("this file holds no graph, so its inputs are unknown; name the project file: --project.")
    generator = torch.Generator().manual_seed(0)
    values = []
    for item in model.graph.inputs:
        shape = [2 if size is None else size for size in item.shape]
        dtype = getattr(torch, item.dtype)
        values.append(
            torch.randn(shape, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype)
        )
    args, kwargs = fill(model.graph.call, lambda leaf: values[leaf.index] if isinstance(leaf, Value) else None)
    return Task(val=[(args, kwargs)], predict=lambda m, batch: m(*batch[0], **batch[1]), target=lambda _: None)


def describe_method(cls: type[Method]) -> dict[str, Any]:
    """One method as plain data: name, verb, kind, paper, summary, fields."""
    from espalier.core.recipe import _plain

    card = cls.card()
    fields = [
        {
            "name": field.name,
            "type": field.type_name,
            "default": _plain(field.default),
            **(
                {
                    "low": field.range.low,
                    "high": _finite(field.range.high),
                    "above": field.range.above,
                    "below": field.range.below,
                    "unit": field.range.unit,
                    "about": field.range.about,
                }
                if field.range
                else {}
            ),
        }
        for field in fields_of(cls)
    ]
    return {
        "name": cls.id, "verb": cls.verb, "kind": cls.kind, "paper": card.paper, "summary": card.summary,
        "formula": card.formula, "departs": card.departs, "fields": fields,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def method_text(cls: type[Method]) -> str:
    """One method for a person."""
    found = describe_method(cls)
    lines = [f"{cls.verb}.{cls.id}  ({cls.kind})", found["summary"], "", f"Paper    {found['paper']}"]
    lines += [f"{head:<8} {found[head.lower()]}" for head in ("Formula", "Departs") if found[head.lower()]]
    lines += ["", (cls.__doc__ or "").strip(), ""]
    for field in fields_of(cls):
        limits = f"   {field.range.about}, {field.range} {field.range.unit}".rstrip() if field.range else ""
        lines.append(f"  {field.name}: {field.type_name} = {_short(field.default)}{limits}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, Method) and not dataclasses.fields(value):
        return value.id
    return repr(value)
