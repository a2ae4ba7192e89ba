"""Progress with an estimate of the time left, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable

    from espalier.core.context import Progress as Report


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Callable[[Report], None] | None]:
    """Yield a listener that draws one bar per running step; bars of finished steps stay, with their time."""
    if quiet:
        yield None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(compact=True), TextColumn("[dim]{task.fields[values]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        bars: dict[tuple[str, str], object] = {}

        def listen(report: Report) -> None:
            key = (report.path, report.label)
            if key not in bars:
                name = f"{report.path} [dim]{report.label}"
                bars[key] = progress.add_task(name, total=report.total, values="")
            values = "  ".join(f"{name} {value:.4g}" for name, value in report.values.items())
            progress.update(bars[key], completed=report.done, total=report.total, values=values)  # type: ignore[arg-type]

        yield listen


def telling(listener: Callable[[Report], None] | None, path: str) -> Callable[[str, int, int], None]:
    """``(what, done, total)`` as a report to ``listener``, for what runs outside a step."""
    from espalier.core.context import Progress as Report

    def tell(what: str, done: int, total: int) -> None:
        if listener is not None:
            listener(Report(path, what, done, total, {}))

    return tell
