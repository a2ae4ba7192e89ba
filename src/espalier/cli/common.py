"""What the commands share: options, output, where a run's project is noted. Nothing heavy is imported here."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of data sets; sets ESPALIER_DATA for the project.")]
ProjectFile = Annotated[Path, typer.Argument(help="Python file with model() and task().")]
File = Annotated[Path, typer.Argument(help="An .espalier file.")]
Threads = Annotated[int | None, typer.Option(help="torch threads; results repeat for equal threads.", min=1)]
Layers = Annotated[list[str] | None, typer.Option(help="Layers by name, type:Conv2d or #0; repeat for more.")]
KeepFp32 = Annotated[
    list[str] | None, typer.Option(help="Of int8: layers or activations by name that stay in fp32; repeat for more.")
]
Watching = Annotated[
    str | None, typer.Option(help="Of int8: ranges of activations by minmax, percentile, mse, entropy or ema [minmax].")
]
Part = Annotated[str | None, typer.Option(help="Of a transformer: heads, width, feed-forward or hidden alone.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]

PROJECT_NOTE = "project.txt"
"""In a run directory: the project file of the command line, so that ``bench`` and ``export`` find the original."""
MISSED = 3
"""Exit code where a target was not reached."""


def say(text: str) -> None:
    """Print to standard output."""
    typer.echo(text)


def tell(text: str) -> None:
    """Print to standard error: what is no result."""
    typer.echo(text, err=True)


def emit(data: Any) -> None:
    """Print JSON to standard output."""
    typer.echo(json.dumps(data, indent=1))


def prepare(data_dir: Path | None, threads: int | None) -> None:
    """Set what a project file may read while it is loaded."""
    if data_dir is not None:
        os.environ["ESPALIER_DATA"] = str(data_dir)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def warnings_as_sentences() -> Iterator[None]:
    """espalier's warnings as one line each on standard error; others as Python shows them."""
    from espalier.core.errors import EspalierWarning

    usual = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, EspalierWarning):
            tell(f"warning: {message}")
        else:
            usual(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", EspalierWarning)
        warnings.showwarning = show
        yield


def say_if_fresh(out: Path, *, resume: bool) -> None:
    """Say where ``--resume`` finds nothing to go on with."""
    if resume and not (out / "journal.jsonl").is_file():
        tell(f"note: there is no run in {out} to go on with; a new one starts there.")


def note_project(out: Path, project: Path) -> None:
    """Leave in a run directory which project file it came from."""
    (out / PROJECT_NOTE).write_text(f"{project.resolve()}\n")


def noted_project(source: Path) -> Path | None:
    """The project file that the run of ``source`` (its folder or a file in it) came from, if it is still there."""
    note = (source if source.is_dir() else source.parent) / PROJECT_NOTE
    project = Path(note.read_text().strip()) if note.is_file() else None
    return project if project is not None and project.is_file() else None


def show_record(record: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """A run's record: as JSON, or as the terminal's report and where the files are."""
    if as_json:
        emit(record)
        return
    from rich.console import Console

    from espalier.report import render_terminal

    render_terminal(record, Console())
    for label, path in (("file", out / "model.espalier"), ("report", out / "report.html")):
        if path.exists():
            say(f"{label:<7} {path}")
