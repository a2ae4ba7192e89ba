"""``espalier sensitivity``: how the metric falls as each group of coupled channels loses units."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.cli.common import DataDir, Json, Layers, Part, ProjectFile, Threads, emit, prepare, warnings_as_sentences
from espalier.cli.steps import pruning, units
from espalier.core.errors import UsageError

if TYPE_CHECKING:
    from espalier.cli.project import Project


def sensitivity(
    project: ProjectFile,
    levels: Annotated[str, typer.Option(help="Shares of each group to try, in percent.")] = "25,50,75",
    part: Part = None,
    criterion: Annotated[str | None, typer.Option(help="What is unimportant: magnitude, sensitivity ...")] = None,
    layers: Layers = None,
    out: Annotated[Path, typer.Option(help="Folder for sensitivity.json; a second call goes on there.")] = Path(
        "runs/sensitivity"
    ),
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show how the metric on val falls as each group of coupled channels loses units; nothing is changed."""
    prepare(data_dir, threads)
    from espalier import api
    from espalier.cli.progress import shown
    from espalier.cli.project import load_project

    api.fill_registry()
    fields = {"criterion": criterion, "layers": layers or None}
    with warnings_as_sentences(), shown(quiet=as_json) as listener:
        found = measured(load_project(project), fields, part, levels, out, listener)
    emit(found) if as_json else show(found, out)


def measured(
    project: Project, fields: dict[str, Any], part: str | None, levels: str, out: Path, listener: Any
) -> dict[str, Any]:
    """The analysis as plain data, kept in ``out/sensitivity.json``; an interrupted one goes on."""
    from espalier.core.context import Context
    from espalier.core.files import write_atomic
    from espalier.core.model import copy_model
    from espalier.prune.analysis import analyse
    from espalier.prune.unit_removal import Removal
    from espalier.runs.checkpoint import EpochFile

    step, pattern = pruning(fields), units(part)
    context = Context(task=project.task, models={"original": project.model}, listener=listener)
    store = EpochFile(out / "sensitivity.part")
    removal = Removal.of(step.replace(pattern=pattern), pattern, copy_model(project.model), context)
    found = analyse(removal, parse_levels(levels), store=store)
    write_atomic(out / "sensitivity.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def parse_levels(text: str) -> tuple[float, ...]:
    """``25,50%`` -> ``(0.25, 0.5)``. Raises ``UsageError``."""
    parts = [part.strip().removesuffix("%") for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+", part) and 0 < float(part) < 100 for part in parts):
        raise UsageError(f"--levels {text!r} is not understood: write percentages above 0 and below 100, as in 25,50.")
    return tuple(sorted(float(part) / 100 for part in parts))


def show(found: dict[str, Any], out: Path) -> None:
    """The analysis as a table for people, most sensitive first."""
    from rich.console import Console
    from rich.table import Table

    better = 1 if found["higher_is_better"] else -1
    title = f"{found['metric']} on {found['split']}: {found['full']:.2f} {found['unit']} with all units"
    table = Table(title=title, title_justify="left")
    table.add_column("group")
    table.add_column("units", justify="right")
    for level in found["levels"]:
        table.add_column(f"-{level:.0%}", justify="right")
    noise = 2 * found["stderr"]
    for row in sorted(found["groups"], key=lambda row: better * sum(row["values"])):
        drops = [better * (found["full"] - value) for value in row["values"]]
        cells = [
            f"[{'red' if drop > 10 * noise else 'yellow' if drop > noise else 'green'}]{value:.2f}[/]"
            for value, drop in zip(row["values"], drops, strict=True)
        ]
        table.add_row(row["name"], f"{row['size']:,}", *cells)
    console = Console()
    console.print(table)
    console.print("green: within two standard errors of the whole model; red: beyond twenty", highlight=False)
    console.print(f"kept    {out / 'sensitivity.json'}", highlight=False)
