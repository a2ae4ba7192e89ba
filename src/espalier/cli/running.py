"""A run, as the commands that compress have it in common: said, shown, and noted in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier import api
from espalier.api import Result
from espalier.cli.common import note_project, say_if_fresh
from espalier.cli.progress import shown
from espalier.cli.project import Project
from espalier.core.method import Technique


def run(
    loaded: Project, recipe: Technique, project: Path, out: Path, *, seed: int, resume: bool, quiet: bool, **more: Any
) -> Result:
    """Compress the project's model by ``recipe`` into ``out``; ``more`` as for :func:`espalier.compress`."""
    say_if_fresh(out, resume=resume)
    with shown(quiet=quiet) as listener:
        result = api.compress(
            loaded.model, loaded.task, recipe, out=out, seed=seed, resume=resume, models=loaded.models,
            listener=listener, **more,
        )  # fmt: skip
    note_project(out, project)
    return result
