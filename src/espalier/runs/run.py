"""One run, from model and task to two verified files, a record and the best result so far on disk."""

from __future__ import annotations

import copy
import datetime as dt
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier
from espalier.core.context import Context, Progress
from espalier.core.errors import EspalierError, RunError, TargetError
from espalier.core.method import Technique
from espalier.core.metric import Score
from espalier.core.model import check_finite, copy_model, digest
from espalier.core.parametrize import plain
from espalier.core.plan import base
from espalier.core.recipe import FileOptions, Recipe, step_to_data
from espalier.core.target import Target
from espalier.core.task import Task, capture_call
from espalier.encode.coders import resolve
from espalier.measure import fp32_safetensors_bytes, measure_all, paired, run_zeros
from espalier.runs.context import RunContext
from espalier.runs.directory import RunDirectory
from espalier.runs.files import SELF_CONTAINED, WEIGHTS_ONLY, Written, load, write_files
from espalier.runs.strength import Outcome, has_strength, search_strength


@dataclass
class Result:
    """What a run hands back. ``model`` is the re-loaded file; ``record`` the plain data of ``record.json``."""

    model: nn.Module
    path: Path
    record: dict[str, Any]

    @property
    def file(self) -> Path:
        """The self-contained file."""
        return self.path / SELF_CONTAINED

    @property
    def bytes(self) -> int:
        """Its length."""
        return int(self.record["compressed"]["file_bytes"])

    @property
    def met(self) -> bool:
        """Whether the target was met (True where none was given)."""
        return bool(self.record["status"] == "done")

    def __str__(self) -> str:
        return str(self.record["message"])


@dataclass
class Run:
    """The parts a run needs; :meth:`execute` does it."""

    model: nn.Module
    task: Task
    recipe: Technique
    directory: RunDirectory
    target: Target = field(default_factory=Target)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    listener: Callable[[Progress], None] | None = None
    models: Mapping[str, nn.Module] = field(default_factory=dict)
    seconds_to_time: float = 2.0

    @property
    def options(self) -> FileOptions:
        """How the result is written."""
        return self.recipe.file if isinstance(self.recipe, Recipe) else FileOptions()

    def check(self) -> None:
        """Raise for everything that can be known to be wrong before any work: nothing has been written yet."""
        check_finite(self.model, "before any step")
        resolve(self.options.coders)
        self.task.example()
        names = {**self.models, "original": self.model}
        Context(task=self.task, models=names).check(self.recipe)
        if not self.target.empty and self.task.val is None:
            raise TargetError("a target is decided on validation data, which the task lacks. Give Task(val=...).")
        if not self.target.empty and not has_strength(self.recipe):
            raise TargetError(
                f"{self.recipe.name} has no strength to search over, so a target cannot be met with it. Use a recipe "
                "that has one (deep-compression), or run it without a target."
            )
        capture_call(self.task, copy_model(self.model), self.task.example())

    def execute(self) -> Result:
        """Run, write, re-load, measure, record. Ctrl-C and failures leave the best so far."""
        self.check()
        original = plain(self.model).to(self.device).eval()  # masks read from elsewhere stay with the start
        context = RunContext(
            task=self.task, seed=self.seed, models={**self.models, "original": original, "best": original},
            listener=self.listener, directory=self.directory, options=self.options,
        )  # fmt: skip
        self._log_start(original)
        if self.directory.find("done") is not None:
            return self._read_back(original)
        try:
            outcome = self._search(context, original)
        except KeyboardInterrupt:
            self._write_interrupted("interrupted by Ctrl-C")
            raise
        except EspalierError as error:
            self._write_interrupted(str(error))
            raise
        return self._finish(context, original, outcome)

    # --- before ----------------------------------------------------------------------------------

    def _log_start(self, original: nn.Module) -> None:
        start = {
            "recipe": step_to_data(self.recipe),
            "target": self.target.to_json(),
            "seed": self.seed,
            "model": digest(original),
        }
        begun = self.directory.find("start")
        if begun is None:
            environment = {"threads": torch.get_num_threads(), **versions()}
            self.directory.write("recipe.yaml", Recipe(steps=(self.recipe,), file=self.options).to_yaml())
            self.directory.log("start", **start, environment=environment, created=_now())
            return
        for key, meaning in (
            ("recipe", "recipe"),
            ("target", "target"),
            ("seed", "seed"),
            ("model", "model's weights"),
        ):
            if json.loads(json.dumps(start[key])) != begun[key]:
                raise RunError(
                    f"{self.directory.path} was started with another {meaning}; a resume goes on with the same. "
                    "Start a new run in another folder, or resume with what it was started with."
                )
        torch.set_num_threads(begun["environment"]["threads"])
        now = versions()
        changed = [name for name, value in now.items() if begun["environment"].get(name) != value]
        if changed:
            Context().warn(f"resumed with another {', '.join(changed)} than it was started with; bytes may differ.")

    # --- the work --------------------------------------------------------------------------------

    def _search(self, context: RunContext, original: nn.Module) -> Outcome:
        spent = sum(entry["seconds"] for entry in self.directory.events("try"))
        if self.target.minutes is not None:
            context.deadline = time.monotonic() + self.target.minutes * 60 - spent
        before = self._baseline(context, original)

        def attempt(recipe: Technique, name: str) -> tuple[int, Score | None]:
            return self._attempt(context, recipe, name)

        return search_strength(
            self.recipe, self.target, self.directory, attempt=attempt, keep=self._keep, before=before,
            drop=self.task.scorer().drop, original_bytes=fp32_safetensors_bytes(original), context=context,
        )  # fmt: skip

    def _baseline(self, context: RunContext, original: nn.Module) -> Score | None:
        if self.task.val is None:
            return None
        done = self.directory.find("baseline")
        if done is None:
            score = context.measure(original)
            self.directory.log("baseline", value=score.value, stderr=score.stderr, count=score.count)
            return score
        return Score(done["value"], done["stderr"], done["count"])

    def _attempt(self, context: RunContext, recipe: Technique, name: str) -> tuple[int, Score | None]:
        """Run one recipe and write its files; returns the length of ``model.espalier`` and its score on val.

        The file of weights is for a receiver with the model that the result is made from: a student may be one.
        """
        model = context.run(recipe, copy_model(self.model).to(self.device).eval(), name)
        writer = context.child(f"{name}/file", recipe)
        written = write_files(model, context.model(base(model)), writer, self.options, self._folder(name))
        self.directory.log("file", name=name, base=base(model), **self._describe(written, writer))
        length = int(written.files[SELF_CONTAINED]["bytes"])
        return length, written.val

    @staticmethod
    def _describe(written: Written, writer: Context) -> dict[str, Any]:
        return {
            "floats": written.floats,
            "files": written.files,
            "notes": writer.record.notes,
            "warnings": writer.record.warnings,
        }

    def _folder(self, name: str) -> Path:
        """Where a try's files stand; a run without a target has one try, the run itself."""
        return self.directory.path if self.target.empty else self.directory.path / "tries" / name

    def _keep(self, name: str) -> None:
        """Make a try the best so far: its files become the run's, one atomic replacement each."""
        if self._folder(name) != self.directory.path:
            for file in (WEIGHTS_ONLY, SELF_CONTAINED):
                self.directory.write(file, (self._folder(name) / file).read_bytes())

    # --- after -----------------------------------------------------------------------------------

    def _finish(self, context: RunContext, original: nn.Module, outcome: Outcome) -> Result:
        model = self._reload(original, outcome.name)
        record = self._record(context, original, model, outcome)
        self._write_record(record)
        self.directory.log("done", status=record["status"], name=outcome.name)
        return Result(model, self.directory.path, record)

    def _read_back(self, original: nn.Module) -> Result:
        """A finished run: nothing is computed again."""
        path = self.directory.path / "record.json"
        done = self.directory.find("done") or {}
        if not path.is_file():
            raise RunError(f"{path} is gone although the run is finished; start again in a new folder.")
        return Result(self._reload(original, done["name"]), self.directory.path, json.loads(path.read_text()))

    def _reload(self, original: nn.Module, name: str) -> nn.Module:
        path = self.directory.path / SELF_CONTAINED
        event = self.directory.find("file", name=name) or {}
        if event["files"][SELF_CONTAINED]["info"]["graph"]:
            return load(path)
        skeleton = {**self.models, "original": original}[event.get("base", "original")]
        return load(path, into=copy_model(skeleton).cpu()).eval()

    def _record(self, context: RunContext, original: nn.Module, model: nn.Module, outcome: Outcome) -> dict[str, Any]:
        from espalier.runs.summary import summarise

        begun = self.directory.find("start") or {}
        file = self.directory.find("file", name=outcome.name) or {}
        host = copy_model(original).cpu().eval()
        file_bytes = {
            "original": fp32_safetensors_bytes(original),
            "compressed": file["files"][SELF_CONTAINED]["bytes"],
        }
        measured = measure_all(
            {"original": host, "compressed": model}, self.task, split="val" if self.task.val is not None else None,
            original=host, file_bytes=file_bytes, macs=_macs(host, model, self.task), threads=torch.get_num_threads(),
            seconds=self.seconds_to_time,
        )  # fmt: skip
        zeros = run_zeros(model, self.task, threads=torch.get_num_threads(), seconds=self.seconds_to_time)
        test, pairs = {}, {}
        if self.task.test is not None:  # the one look at test
            for name, candidate in (("original", host), ("compressed", model)):
                test[name] = vars(self.task.measure(candidate, "test", host))
            if self.task.labelled:
                pairs = paired(host, model, self.task, "test").to_json()
        done = [entry for entry in self.directory.events("step") if _under(entry, outcome)]
        return summarise(
            begun=begun, file=file, outcome=outcome, measured={name: m.to_json() for name, m in measured.items()},
            test=test, pairs=pairs, steps=_told(done),
            tries=self.directory.events("try"), metric=self.task.scorer(), model=type(self.model).__name__,
            zeros=zeros,
        )  # fmt: skip

    def _write_record(self, record: dict[str, Any]) -> None:
        self.directory.write("record.json", json.dumps(record, indent=1, allow_nan=False))

    def _write_interrupted(self, message: str) -> None:
        begun = self.directory.find("start") or {}
        steps = [entry["record"] for entry in self.directory.events("step") if entry["leaf"]]
        self._write_record(
            {
                "schema": 1,
                "espalier": espalier.__version__,
                "created": begun.get("created"),
                "status": "interrupted",
                "message": f"{message}. Finished so far: {len(steps)} steps; go on with --resume.",
                "recipe": begun.get("recipe"),
                "target": begun.get("target") or None,
                "environment": begun.get("environment", {}),
                "steps": steps,
                "tries": self.directory.events("try"),
            }
        )


def _under(entry: Mapping[str, Any], outcome: Outcome) -> bool:
    return str(entry["path"]).split("/")[0] == outcome.name


def _told(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of leaves, and before its steps that of each composite that has something to say itself."""
    paths = [entry["path"] for entry in done]

    def place(entry: dict[str, Any]) -> tuple[int, int]:
        inside = [n for n, path in enumerate(paths) if f"{path}/".startswith(f"{entry['path']}/")]
        return inside[0], len(entry["path"])

    found = []
    for entry in sorted(done, key=place):
        record = entry["record"]
        if entry["leaf"]:
            found.append(record)
        elif any(record[part] for part in ("skipped", "notes", "warnings", "details")):
            found.append({**record, "before": {}, "after": {}, "seconds": None})  # its steps tell these
    return found


def _macs(original: nn.Module, model: nn.Module, task: Task) -> dict[str, int]:
    from espalier.core.errors import ModelError
    from espalier.graph import macs, trace

    found = {}
    for name, candidate in (("original", original), ("compressed", model)):
        bare = plain(copy.deepcopy(candidate))
        args, kwargs = capture_call(task, bare, task.example())
        try:
            found[name] = macs(trace(bare, args, kwargs)).total
        except ModelError:  # said once already, when the file was written without a graph
            continue
    return found


def versions() -> dict[str, Any]:
    """What decides the bytes beside seed and recipe: versions and processor type; no host name, no path."""
    import numpy as np

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "espalier": espalier.__version__,
        "cpu": _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
