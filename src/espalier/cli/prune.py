"""``espalier prune``: channels removed, or weights masked, to a target in the user's units; a plan first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.core.errors import UsageError

if TYPE_CHECKING:
    from espalier.cli.project import Project
    from espalier.prune import Prune

Amount = Annotated[str | None, typer.Option(help="Share to remove (50%), how many times less (2x), or what may stay.")]
_MEASURES = {"channels": "units", "parameters": "parameters", "macs": "macs", "size": "bytes", "ms": "ms"}
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1048576.0}


def parse_amount(text: str, what: str) -> tuple[float | None, float | None]:
    """``(share to remove, None)`` for ``50%`` and ``2x``, ``(None, what may stay)`` for ``200k``, ``1.5MB`` or ``5``.

    Raises ``UsageError`` for anything else, and for a share outside 0 to 100 %.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|x|[kMG]|[kM]?B|[KM]iB|ms)?\s*", text)
    number, unit = (float(found[1]), found[2] or "") if found else (0.0, "")
    share = number / 100 if unit == "%" else 1 - 1 / number if unit == "x" and number else None
    if found and share is not None and 0 <= share < 1:
        return share, None
    unit = "" if unit == "ms" and what == "ms" else unit
    if found and share is None and unit in _FACTORS and number > 0 and what != "channels":
        return None, number * _FACTORS[unit]
    raise UsageError(
        f"--{what} {text!r} is not understood: write the share to remove (50%, from 0 to below 100), how many times "
        f"less (2x){'' if what == 'channels' else ', or what may stay (200k, 1.5MB)'}."
    )


def build(
    project: Project,
    amounts: dict[str, str | None],
    fields: dict[str, Any],
    multiple: int,
    part: str | None,
    *,
    analyse: bool = False,
) -> Prune:
    """The step the options describe."""
    from espalier.core.context import Context
    from espalier.core.recipe import step_from_data
    from espalier.prune import Channels, Heads, Prune
    from espalier.prune.structure import Removal

    given = {name: text for name, text in amounts.items() if text is not None}
    if len(given) != 1:
        raise UsageError(
            f"give one of --sparsity, {', '.join('--' + name for name in _MEASURES)}; got "
            f"{', '.join('--' + name for name in given) or 'none'}."
        )
    ((what, text),) = given.items()
    step = step_from_data({"prune.prune": {name: value for name, value in fields.items() if value is not None}})
    assert isinstance(step, Prune)  # noqa: S101 - named so
    if what == "sparsity":
        if analyse:
            raise UsageError("--analyse goes with channels, parameters, macs, size or ms; --sparsity masks weights.")
        share, _ = parse_amount(text, "channels")
        return step.replace(sparsity=share)
    measure: Any = _MEASURES[what]
    pattern = Channels(measure=measure, multiple=multiple, analyse=analyse)
    if part is not None:
        pattern = Heads(part=part, measure=measure, multiple=multiple, analyse=analyse)  # type: ignore[arg-type,assignment]
    share, left = parse_amount(text, what)
    step = step.replace(pattern=pattern, sparsity=share if share is not None else 0.5)
    if left is not None:
        start = Removal.of(step, pattern, project.model, Context(task=project.task)).start_of(measure)
        if left >= start:
            raise UsageError(f"--{what} {text}: the model has {start:,.0f} already; nothing needs to go.")
        step = step.replace(sparsity=1 - left / start)
    return step


def show_plan(found: dict[str, Any]) -> None:
    """The plan as tables for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what goes", title_justify="left")
    for column in ("group", "kind", "units", "kept", "reaches"):
        table.add_column(column, justify="right" if column in ("units", "kept") else "left")
    for row in found["groups"]:
        names = row["tensors"]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        table.add_row(row["name"], row["kind"], str(row["before"]), str(row["after"]), ", ".join(names[:3]) + more)
    console = Console()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for item in found["protected"]:
        reasons.setdefault(item["reason"], []).append(f"{item['tensor']} dimension {item['dim']}")
    if reasons:
        protected = Table(title="what stays", title_justify="left")
        protected.add_column("reason")
        protected.add_column("where")
        for reason, names in reasons.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            protected.add_row(reason, ", ".join(names[:4]) + more)
        console.print(protected)
    for boundary in found["boundaries"]:
        console.print(
            f"boundary: {boundary} has no channel rule; the channels that reach it stay whole", highlight=False
        )
    for label, key in (("parameters", "parameters"), ("multiply-adds per sample", "macs")):
        before, after = found[key]
        console.print(
            f"{label}: {before:,} -> {after:,} ({after / max(1, before):.1%}, {before / max(1, after):.2f}x less)",
            highlight=False,
        )


def dry_run(project: Path, step: Prune, loaded: Project) -> dict[str, Any]:
    """The plan as plain data; the project's model is not touched."""
    from espalier.core.context import Context
    from espalier.core.model import copy_model
    from espalier.prune.structure import preview

    context = Context(task=loaded.task, models={"original": loaded.model})
    return {"project": project.name, **preview(step, copy_model(loaded.model), context).to_json()}


def sensitivity(
    project: Project, fields: dict[str, Any], part: str | None, levels: str, out: Path, listener: Any
) -> dict[str, Any]:
    """The analysis as plain data, kept in ``out/sensitivity.json``; an interrupted one goes on."""
    from espalier.core.context import Context
    from espalier.core.files import write_atomic
    from espalier.core.model import copy_model
    from espalier.core.recipe import step_from_data
    from espalier.prune import Channels, Heads, Prune
    from espalier.prune.analysis import analyse
    from espalier.prune.structure import Removal
    from espalier.runs.checkpoint import EpochFile

    step = step_from_data({"prune.prune": {name: value for name, value in fields.items() if value is not None}})
    assert isinstance(step, Prune)  # noqa: S101 - named so
    pattern = Channels() if part is None else Heads(part=part)  # type: ignore[arg-type]
    step = step.replace(pattern=pattern)
    context = Context(task=project.task, models={"original": project.model}, listener=listener)
    store = EpochFile(out / "sensitivity.part")
    removal = Removal.of(step, pattern, copy_model(project.model), context)
    found = analyse(removal, parse_levels(levels), store=store)
    write_atomic(out / "sensitivity.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def parse_levels(text: str) -> tuple[float, ...]:
    """``25,50%`` -> ``(0.25, 0.5)``. Raises ``UsageError``."""
    parts = [part.strip().removesuffix("%") for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+", part) and 0 < float(part) < 100 for part in parts):
        raise UsageError(f"--levels {text!r} is not understood: write percentages above 0 and below 100, as in 25,50.")
    return tuple(sorted(float(part) / 100 for part in parts))


def show_sensitivity(found: dict[str, Any], out: Path) -> None:
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
