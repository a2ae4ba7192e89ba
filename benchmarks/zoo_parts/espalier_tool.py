"""espalier's side of the comparison: remove channels down to half the parameters, no hints."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.zoo_parts.checks import EXACT, EXPORTED, Row, attempt, common_checks, late_checks, output_of, within
from benchmarks.zoo_parts.models import relative
from torch import Tensor, nn

import espalier as es
from espalier.core.recipe import FileOptions
from espalier.core.task import Task
from espalier.deploy import to_onnx
from espalier.prune.removal import remove_channels
from espalier.runs.files import freeze_model, write_self_contained


def prune_to_half(model: nn.Module, x: Tensor) -> Any:
    """The pruned model with its plan, boundaries and difference to the masked reference."""
    return remove_channels(model, (x,), sparsity=0.5, measure="parameters")


def prune(row: Row, model: nn.Module, x: Tensor, seconds: float) -> Any:  # noqa: ARG001 - one signature for all tools
    """Prune and say how; an exception is a failure of the row."""
    started, busy = time.perf_counter(), time.process_time()
    result = prune_to_half(model, x)
    row["seconds"]["prune"] = round(time.perf_counter() - started, 2)
    row["seconds"]["prune_cpu"] = round(time.process_time() - busy, 2)
    row["kind"] = result.kind
    row["boundaries"] = list(result.boundaries)
    return result


def check(row: Row, model: nn.Module, result: Any, x: Tensor) -> None:
    """All assertions on the result of ``prune``."""
    pruned = result.model
    runs = common_checks(row, model, pruned, x)
    attempt(row, "boundaries_listed", lambda: isinstance(result.boundaries, tuple))
    attempt(row, "masked_reference", lambda: within(row, "masked_reference", float(result.difference), EXACT))
    if runs:
        attempt(row, "saved", lambda: within(row, "saved", saved_and_loaded(row, pruned, x), EXACT))
        late_checks(row, model, pruned, x, exported)


def exported(pruned: nn.Module, x: Tensor, row: Row) -> bool:
    """Written by espalier's export, which runs the file in onnxruntime, at other batch sizes too."""
    with tempfile.TemporaryDirectory() as folder:
        done = to_onnx(pruned, x, Path(folder) / "model.onnx", runtime="onnxruntime", tolerance=EXPORTED)
    row["reasons"] |= {"onnx_note": "; ".join(done.notes)} if done.notes else {}
    return within(row, "onnx", done.difference, EXPORTED)


def saved_and_loaded(row: Row, pruned: nn.Module, x: Tensor) -> float:
    """Write the self-contained file, load it without the class, compare."""
    frozen = freeze_model(pruned, Task(val=[x]))
    if frozen.graph is None:
        raise RuntimeError(frozen.refusal)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.espalier"
        write_self_contained(frozen, path, FileOptions(coders=()), "fp32")
        row["file_bytes"] = path.stat().st_size
        return relative(output_of(es.load(path, max_bytes=2**34, max_elements=2**31), x), output_of(pruned, x))
