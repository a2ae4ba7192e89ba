"""``espalier prune``: channels removed, or weights masked, to a target in the user's units; a plan first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.cli.amounts import MEASURES, check_options, none_given, parse_amount
from espalier.cli.common import (
    MISSED,
    DataDir,
    Json,
    Layers,
    Part,
    ProjectFile,
    Resume,
    Threads,
    emit,
    prepare,
    say,
    show_record,
    tell,
    warnings_as_sentences,
)
from espalier.cli.goal import UNITS, Goal, Verdict, number
from espalier.cli.steps import pruning, units
from espalier.core.errors import UsageError

if TYPE_CHECKING:
    from espalier.cli.project import Project
    from espalier.prune import Prune

Share = Annotated[str | None, typer.Option(help="Share to remove (50%), times less (2x), or what may stay (200k).")]


def prune(
    project: ProjectFile,
    channels: Annotated[str | None, typer.Option(help="Share of the channels of every group to remove: 50%.")] = None,
    parameters: Share = None,
    macs: Share = None,
    size: Share = None,
    ms: Share = None,
    sparsity: Annotated[str | None, typer.Option(help="Share of single weights to mask: 90% or 0.9.")] = None,
    part: Part = None,
    criterion: Annotated[
        str | None, typer.Option(help="What is unimportant: magnitude, sensitivity, random ...")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="With --sparsity: weights, blocks, kernel-parts ...")] = None,
    scope: Annotated[str | None, typer.Option(help="layer, global, isomorphic or apart.")] = None,
    schedule: Annotated[str | None, typer.Option(help="With --epochs: one-shot, linear, cubic ...")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs during which the schedule runs.", min=0)] = None,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards.", min=0)] = 0,
    multiple: Annotated[
        int | None, typer.Option(help="Round channel counts to multiples of this.", min=1, show_default="1")
    ] = None,
    layers: Layers = None,
    analyse: Annotated[
        bool, typer.Option("--analyse", help="Measure first what each group can lose, for the report.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/pruned"),
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    resume: Resume = False,
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prune a model to a target in your units: channels, parameters, MACs, bytes or milliseconds; or mask weights."""
    prepare(data_dir, threads)
    from espalier import api
    from espalier.cli import plan
    from espalier.cli.project import load_project
    from espalier.cli.running import run
    from espalier.core.recipe import FileOptions, Recipe
    from espalier.train import Finetune

    api.fill_registry()
    amounts = {
        "channels": channels, "parameters": parameters, "macs": macs, "size": size, "ms": ms, "sparsity": sparsity,
    }  # fmt: skip
    fields = {
        "criterion": criterion, "pattern": pattern, "scope": scope, "schedule": schedule, "epochs": epochs,
        "layers": layers or None,
    }  # fmt: skip
    with warnings_as_sentences():
        check_options(amounts, fields, multiple, part, analyse=analyse)
        loaded = load_project(project)
        step, goal = build(loaded, amounts, fields, multiple, part, analyse=analyse)
        if dry_run:
            found = plan.dry_run(project, step, goal, loaded)
            emit(found) if as_json else plan.show_plan(found)
            _judge(goal.of_plan(found) if goal is not None else None, as_json=as_json)
            return
        steps = (step, Finetune(epochs=finetune)) if finetune else (step,)
        recipe = Recipe(steps=steps, file=FileOptions(floats="fp16" if size else "auto"))
        result = run(loaded, recipe, project, out, seed=seed, resume=resume, quiet=as_json)
    show_record(result.record, out, as_json=as_json)
    _judge(goal.of_record(result.record) if goal is not None else None, as_json=as_json)


def _judge(verdict: Verdict | None, *, as_json: bool) -> None:
    """Say whether the target was reached; end with code 3 where it was not."""
    if verdict is not None:
        tell(str(verdict)) if as_json else say(str(verdict))
        if not verdict.met:
            raise typer.Exit(MISSED)


def build(
    project: Project,
    amounts: dict[str, str | None],
    fields: dict[str, Any],
    multiple: int | None,
    part: str | None,
    *,
    analyse: bool = False,
) -> tuple[Prune, Goal | None]:
    """The step the options describe, and its target where that is a number that can be missed."""
    from espalier.core.context import Context
    from espalier.measure.size import fp32_safetensors_bytes
    from espalier.prune.parts import CutCriterion, FixedPattern
    from espalier.prune.unit_removal import Removal

    step = pruning(fields)
    what, text = next(((name, text) for name, text in amounts.items() if text is not None), ("", ""))
    if not what:  # what decides the amount itself
        if not isinstance(step.pattern, FixedPattern) and not isinstance(step.criterion, CutCriterion):
            raise none_given()
        return step, None
    share, left = parse_amount(text, what)
    ends = step.schedule.final
    if ends is not None and share != ends:
        raise UsageError(
            f"--schedule {step.schedule.id} ends where {ends:.1%} is gone, whatever --{what} {text} asks for. Give "
            "one that goes as far as it is told (linear, cubic, exponential)."
        )
    if what == "sparsity":
        return step.replace(sparsity=share), None
    measure: Any = MEASURES[what]
    rounded = multiple or 1
    pattern = units(part, measure=measure, multiple=rounded, analyse=analyse)
    original = fp32_safetensors_bytes(project.model) if what == "size" else None
    if original is not None and share is not None:  # as everywhere: of the original saved as fp32 safetensors
        left = (1 - share) * original
    step = step.replace(pattern=pattern, sparsity=0.5 if share is None else share)
    if left is not None:
        start = Removal.of(step, pattern, project.model, Context(task=project.task)).before
        if left >= start:
            less = "Ask for less."
            if original is not None and share is not None:
                less = (
                    f"{number(round(left))} of the {number(original)} bytes of the original (fp32 safetensors) were to "
                    f"stay. Ask for less: a share from {int(100 * (1 - start / original)) + 1}% on."
                )
            coded = ", coded with floats as fp16" if original is not None else ""
            raise UsageError(
                f"--{what} {text}: the model has {number(start)} {UNITS[measure]} already{coded}, so nothing needs to "
                f"go. {less}"
            )
        share = 1 - left / start
        step = step.replace(sparsity=share)
    return step, Goal(f"--{what} {text}", measure, share or 0.0, left, rounded, part, original)
