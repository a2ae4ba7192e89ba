"""The front door: ``compress`` a model towards a target, ``load`` a file. Fills the registry, runs, reports."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier.core import registry
from espalier.core.context import Progress
from espalier.core.errors import EspalierWarning, UsageError, did_you_mean
from espalier.core.method import Technique
from espalier.core.recipe import Recipe, step_from_data
from espalier.core.target import Target
from espalier.recipes.order import harmful
from espalier.runs import Result, Run, load
from espalier.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import nn

    from espalier.core.task import Task

METHOD_ROOMS = ("encode", "train", "prune", "quantize", "share", "factorize", "compact", "distill", "recipes")

__all__ = ["Result", "compress", "fill_registry", "load", "named_recipe"]

_filled: list[bool] = []


def fill_registry() -> None:
    """Import every room that offers methods, and the plugins; once."""
    if not _filled:
        _filled.append(True)
        for room in METHOD_ROOMS:
            importlib.import_module(f"espalier.{room}")
        registry.register_plugins()


def named_recipe(name: str | Path | Technique) -> Technique:
    """A recipe by id (``deep-compression``), by the path of a YAML file, or as it is."""
    fill_registry()
    if isinstance(name, Technique):
        return name
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"there is no recipe file {path}.")
        return Recipe.from_yaml(path.read_text())
    known = [cls.id for cls in registry.methods() if cls.verb == "recipes"]
    if str(name) not in known:
        raise UsageError(
            f"no recipe is called {str(name)!r}.{did_you_mean(str(name), known)} A recipe file ends in .yaml."
        )
    return step_from_data(f"recipes.{name}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here ({error}). Allowed: auto, cpu, cuda where there is one."
        ) from error
    return torch.device(name)


def compress(
    model: nn.Module,
    task: Task,
    recipe: str | Path | Technique = "deep-compression",
    *,
    out: str | Path,
    size: str | None = None,
    max_drop: float | None = None,
    minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    models: Mapping[str, nn.Module] | None = None,
    listener: Callable[[Progress], None] | None = None,
    timing_seconds: float = 2.0,
) -> Result:
    """Compress ``model`` and return the re-loaded, re-measured result; ``model`` itself is never changed.

    Args:
        model: any ``nn.Module``.
        task: data, loss and metric; decisions are taken on ``val``, ``test`` is read once at the end.
        recipe: a technique, the id of a recipe, or the path of a YAML file.
        out: the run directory: new or empty, or with ``resume`` an interrupted run.
        size: target length of the file: ``"10x"``, ``"200kB"``; bisects the recipe's strength.
        max_drop: largest drop of the metric on val, in its unit.
        minutes: time to spend; the best so far is kept.
        seed: root of every step's seed.
        resume: go on with the run in ``out``.
        device: ``auto``, ``cpu`` or ``cuda``.
        models: further models that methods name (teachers, students).
        listener: is told the progress.
        timing_seconds: how long each latency measurement may take; 0 leaves timings out.

    Raises:
        UsageError, NeedError, DataError, NumericError: said before any work.
        RunError: the folder cannot be used.
    """
    chosen = named_recipe(recipe)
    target = Target.parse(size=size, max_drop=max_drop, minutes=minutes)
    run = Run(
        model=model, task=task, recipe=chosen, directory=RunDirectory(Path(out)), target=target, seed=seed,
        device=_device(device), listener=listener, models=models or {}, seconds_to_time=timing_seconds,
    )  # fmt: skip
    run.check()
    for said in harmful(chosen):
        warnings.warn(said, EspalierWarning, stacklevel=2)
    run.directory = RunDirectory.open(Path(out), resume=resume)
    result = run.execute()
    write_report(result.path, result.record)
    return result


def write_report(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write ``report.html`` beside the record and return its path."""
    from espalier.report import write_html

    path = folder / "report.html"
    write_html(dict(record), path)
    return path
