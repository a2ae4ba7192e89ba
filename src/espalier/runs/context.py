"""The context of a run: every step is restored if finished, else checked, verified, recorded and checkpointed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import EspalierError, ModelError
from espalier.core.method import Technique
from espalier.core.model import check_finite, device_of, digest, evaluating, modes, set_modes
from espalier.core.recipe import FileOptions, fields_to_data
from espalier.core.record import Counts, Record
from espalier.core.task import to_device
from espalier.runs.checkpoint import EpochFile, load_model, save_model
from espalier.runs.directory import RunDirectory
from espalier.runs.files import encoded_length


@dataclass
class RunContext(Context):
    """A :class:`Context` that lives in a run directory. ``leaves``: number of steps that ran beneath this one."""

    directory: RunDirectory = field(kw_only=True)
    options: FileOptions = field(kw_only=True)
    leaves: list[str] = field(default_factory=list)
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)

    def child(self, name: str, method: Technique) -> RunContext:
        """As in :class:`Context`, with a fresh list of leaves."""
        from dataclasses import replace

        path = f"{self.path}/{name}" if self.path else name
        return replace(self, path=path, record=Record(path, method.name), leaves=[])

    def epochs(self, name: str = "fit") -> EpochFile:
        """One file per training loop in the step's folder."""
        return EpochFile(self.directory.step(self.path) / f"{name}.epoch")

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        """Run or restore one step; errors are given the step's path once."""
        context = self.child(name or child.id, child)
        self.leaves.append(context.path)
        done = self.directory.find("step", path=context.path)
        if done is not None and done["leaf"]:
            return self._restore(context, model)
        try:
            return context.perform_recorded(child, model, again=done is not None)
        except EspalierError as error:
            if not getattr(error, "step", ""):
                error.step = context.path  # type: ignore[attr-defined]
                error.args = (f"step {context.path}: {error}",)
            raise

    def _restore(self, context: RunContext, model: nn.Module) -> nn.Module:
        path = self.directory.step(context.path) / "model.safetensors"
        restored = load_model(self.model("original"), path, self.models).to(device_of(model))
        return set_modes(restored, modes(model))

    def perform_recorded(self, technique: Technique, model: nn.Module, *, again: bool) -> nn.Module:
        """Perform, verify, and leave record and checkpoint; composites leave a record only."""
        record, started = self.record, time.monotonic()
        record.fields = fields_to_data(technique)
        record.before = self.describe(model)
        interface = self._interface(model)
        result = self.perform(technique, model)
        check_finite(result, f"after {technique.name}")
        self._verify(technique, result, interface)
        record.after = self.describe(result)
        record.seconds = round(time.monotonic() - started, 3)
        leaf = not self.leaves
        if leaf:
            save_model(result, self.directory.step(self.path) / "model.safetensors")
        if not again:
            self.directory.log("step", path=self.path, leaf=leaf, record=record.to_json())
        for leftover in self.directory.step(self.path).glob("*.epoch"):
            leftover.unlink()
        return result

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Counts, bytes if written now, and the metric on val."""
        key = digest(model)
        if key not in self.measured:
            counts = Counts.of(model)
            found: dict[str, Any] = {"parameters": counts.parameters, "nonzero": counts.nonzero}
            length = encoded_length(model, self, self.options)
            if length is not None:
                found["bytes"] = length
            if self.task is not None and self.task.val is not None:
                score = self.measure(model)
                found |= {"metric": score.value, "metric_stderr": score.stderr}
            self.measured.clear()
            self.measured[key] = found
        return self.measured[key]

    def _interface(self, model: nn.Module) -> Any:
        if self.task is None:
            return None
        batch = to_device(self.task.example(), device_of(model))
        with evaluating(model):
            return _shape_of(self.task.predict(model, batch))

    def _verify(self, technique: Technique, model: nn.Module, before: Any) -> None:
        after = self._interface(model)
        if after != before and not technique.changes_outputs:
            raise ModelError(
                f"{technique.name} changed what the model hands back, from {before} to {after}; the step is refused. "
                "Leave the output layer out of its layers."
            )


def _shape_of(output: Any) -> Any:
    """Structure, shapes and types of an output, with NaN reported as a shape of its own."""
    if isinstance(output, Tensor):
        finite = not output.is_floating_point() or bool(torch.isfinite(output).all())
        return (tuple(output.shape), str(output.dtype), "finite" if finite else "NaN")
    if isinstance(output, Mapping):
        return {key: _shape_of(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_shape_of(value) for value in output]
    return type(output).__name__
