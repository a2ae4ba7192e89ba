"""The run directory: what is in it, how it is written, what a resume reads.

    recipe.yaml                    the recipe as run
    journal.jsonl                  append-only: one line per event, the truth about what is finished
    steps/PATH/model.safetensors   checkpoint of a finished step (with the training forms in its metadata)
    steps/PATH/NAME.epoch          state of a running training loop, gone once the step is finished
    tries/, model.espalier, model.weights.espalier, record.json, report.html

Files appear under a temporary name and are moved into place, so a kill leaves the old or the new, never half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.core.errors import RunError
from espalier.core.files import write_atomic, written_to


class RunDirectory:
    """A folder that belongs to one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal: list[dict[str, Any]] = []

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> RunDirectory:
        """A new run in an empty or absent folder, or an interrupted one to go on with.

        Raises ``RunError`` for a folder that holds a run already (without ``resume``), or something else. A run that
        failed before its first epoch or step was finished is started over.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; --out names a folder.")
        if run._journal_file.exists():
            run.journal = list(run._read_journal())
            if not resume and (run.events("step") or any((path / "steps").rglob("*.*"))):
                raise RunError(
                    f"{path} holds a run already. Go on with it by --resume, or name another folder by --out."
                )
            if not resume:  # it failed before its first epoch or step was finished: nothing is lost by starting over
                run.journal = []
                run._journal_file.unlink()
        elif path.is_dir() and any(entry.name != "steps" for entry in path.iterdir()):
            raise RunError(f"{path} is not empty and holds no run of espalier. Name an empty or new folder by --out.")
        with written_to(path):
            path.mkdir(parents=True, exist_ok=True)
        return run

    @property
    def _journal_file(self) -> Path:
        return self.path / "journal.jsonl"

    def _read_journal(self) -> Iterator[dict[str, Any]]:
        data = self._journal_file.read_bytes()
        lines = data.split(b"\n")
        kept = 0
        for number, line in enumerate(lines):
            if not line:
                kept += 1
                continue
            try:
                event = json.loads(line)
            except ValueError as error:
                if number == len(lines) - 1:  # the line a kill cut off
                    break
                raise RunError(
                    f"{self._journal_file} is damaged at line {number + 1}; start again in a new folder."
                ) from error
            kept += len(line) + 1
            yield event
        if not data.endswith(b"\n") and data:
            whole = data[: data.rfind(b"\n") + 1]
            write_atomic(self._journal_file, whole)

    def log(self, event: str, **data: Any) -> None:
        """Append one event; it is on the disk when this returns."""
        entry = {"event": event, **data}
        with written_to(self._journal_file), self._journal_file.open("ab") as file:
            file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.journal.append(entry)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind, in order."""
        return [entry for entry in self.journal if entry["event"] == kind]

    def find(self, kind: str, **keys: Any) -> dict[str, Any] | None:
        """The last event of a kind whose entries equal ``keys``."""
        entry: dict[str, Any]
        for entry in reversed(self.journal):
            if entry["event"] == kind and all(entry.get(key) == value for key, value in keys.items()):
                return entry
        return None

    def step(self, path: str) -> Path:
        """The folder of a step."""
        return self.path / "steps" / path

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file of the run atomically and return its path."""
        return write_atomic(self.path / name, data, parents=True)
