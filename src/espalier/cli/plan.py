"""``espalier prune --dry-run``: what would go, as plain data and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.cli.goal import Goal, number
from espalier.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from espalier.cli.project import Project
    from espalier.core.context import Context
    from espalier.prune import Prune

LINE = 300
_MEASURED = {"bytes": "bytes of the coded weights", "ms": "milliseconds of one call"}
_INSTEAD = "Run it without --dry-run: your model is not changed, the result stands in the folder of --out."


def dry_run(project: Path, step: Prune, goal: Goal | None, loaded: Project) -> dict[str, Any]:
    """The plan as plain data; the project's model is not touched. Raises ``UsageError`` where a step has none."""
    from espalier.core.context import Context
    from espalier.core.model import copy_model
    from espalier.prune.preview import preview
    from espalier.prune.structure import Structural

    context = Context(task=loaded.task, models={**loaded.models, "original": loaded.model})
    if isinstance(step.pattern, Structural):
        found = preview(_untrained(step), copy_model(loaded.model), context).to_json()
    else:
        found = _masked(step, loaded, context)
    if step.epochs:
        context.note("chosen by the weights as they are now; with --epochs the choice is made while they train.")
    verdict = goal.of_plan(found) if goal is not None else None
    target = {} if verdict is None else {"target": verdict.to_json()}
    return {
        "project": project.name, **found, **target, "skipped": context.record.skipped, "notes": context.record.notes,
    }  # fmt: skip


def _untrained(step: Prune) -> Prune:
    """The step without its training. Raises ``UsageError`` where it decides in training."""
    try:
        return step.replace(epochs=0)
    except UsageError as error:
        raise UsageError(f"--dry-run does not train, and this step decides in training: {error} {_INSTEAD}") from error


def _masked(step: Prune, loaded: Project, context: Context) -> dict[str, Any]:
    """How many weights of each layer a masking step would set to zero, found out on a copy, without training."""
    from espalier.core.model import copy_model
    from espalier.core.parametrize import slots
    from espalier.prune.parts import Projection
    from espalier.prune.removing import Removing

    if isinstance(step.pattern, (Removing, Projection)):
        raise UsageError(
            f"--dry-run shows what goes of channels, heads and single weights; pattern {step.pattern.id} decides while "
            f"it works. {_INSTEAD}"
        )
    once = _untrained(step)
    context.check(once)
    model = copy_model(loaded.model)
    zeros = {name: int((slot.value() == 0).sum()) for name, slot in slots(model).items()}
    with context.entered():
        model = context.perform(once, model)
    layers = [
        {
            "name": name,
            "weights": slot.latent.numel(),
            "zeros_before": zeros[name],
            "zeros_after": int((slot.value() == 0).sum()),
        }
        for name, slot in slots(model).items()
        if slot.latent.ndim > 1
    ]
    return {"layers": layers}


def show_plan(found: dict[str, Any]) -> None:
    """The plan as tables for people."""
    from rich.console import Console

    console = Console()
    _masks(found, console) if "layers" in found else _units(found, console)


def _masks(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(title="what becomes zero", title_justify="left")
    for column in ("layer", "weights", "zero now", "zero then", "share"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    rows = found["layers"]
    total = {key: sum(row[key] for row in rows) for key in ("weights", "zeros_before", "zeros_after")}
    for row in [*rows, {"name": "all", **total}]:
        share = f"{row['zeros_after'] / max(1, row['weights']):.1%}"
        table.add_row(row["name"], *(f"{row[key]:,}" for key in total), share)
    console.print(table)
    if total["zeros_after"] == total["zeros_before"]:
        console.print("nothing goes: no weight becomes zero at this amount. Ask for more.", highlight=False)
    _sentences(found, console)


def _units(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(title="what goes", title_justify="left")
    for column in ("group", "kind", "units", "kept", "reaches"):
        table.add_column(column, justify="right" if column in ("units", "kept") else "left")
    for row in found["groups"]:
        table.add_row(row["name"], row["kind"], str(row["before"]), str(row["after"]), _few(row["tensors"], 3))
    console.print(table)
    if all(row["before"] == row["after"] for row in found["groups"]):
        console.print("nothing goes: every group keeps all its units at this amount. Ask for more.", highlight=False)
    _sentences(found, console)
    reasons: dict[str, list[str]] = {}
    for item in found["protected"]:
        reasons.setdefault(item["reason"], []).append(f"{item['tensor']} dimension {item['dim']}")
    if reasons:
        protected = Table(title="what stays", title_justify="left")
        protected.add_column("reason")
        protected.add_column("where")
        for reason, names in reasons.items():
            protected.add_row(reason, _few(names))
        console.print(protected)
    for boundary in found["boundaries"]:
        console.print(
            f"boundary: {boundary} has no channel rule; the channels that reach it stay whole", highlight=False
        )
    lines = {"parameters": found["parameters"], "multiply-adds per sample": found["macs"]}
    measured = found.get("measure") or {}
    if measured.get("name") in _MEASURED:
        lines[_MEASURED[measured["name"]]] = (measured["before"], measured["after"])
    for label, (before, after) in lines.items():
        share = f"{after / max(1e-9, before):.1%}, {before / max(1e-9, after):.2f}x less"
        console.print(f"{label}: {number(before)} -> {number(after)} ({share})", highlight=False)


def _sentences(found: dict[str, Any], console: Console) -> None:
    """What the step says and what it leaves alone, each reason once."""
    from espalier.report.units import printable

    reasons: dict[str, list[str]] = {}
    for row in found["skipped"]:
        reasons.setdefault(row["reason"], []).append(row["name"])
    left = [f"left alone, {reason}: {_few(names)}" for reason, names in reasons.items()]
    for said in (*found["notes"], *left):
        console.print(printable(said, LINE), highlight=False, markup=False)


def _few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
