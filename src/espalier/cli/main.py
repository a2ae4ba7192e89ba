"""The ``espalier`` command. Heavy imports happen inside the commands: ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from espalier.core.errors import EspalierError, UsageError

app = typer.Typer(
    name="espalier",
    help="The smallest, fastest network that is still good enough: as a file, with the proof and the picture.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of data sets; sets ESPALIER_DATA for the project.")]
ProjectFile = Annotated[Path, typer.Argument(help="Python file with model() and task().")]
File = Annotated[Path, typer.Argument(help="An .espalier file.")]
Threads = Annotated[int | None, typer.Option(help="torch threads; results repeat for equal threads.", min=1)]


PROJECT_NOTE = "project.txt"
"""In a run directory: the project file of the command line, so that ``bench`` finds the original."""


def say(text: str) -> None:
    """Print to standard output."""
    typer.echo(text)


def emit(data: Any) -> None:
    """Print JSON to standard output."""
    typer.echo(json.dumps(data, indent=1))


INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point: errors become one sentence and an exit code (2 wrong use or input, 130 Ctrl-C)."""
    try:
        code = app(standalone_mode=False)
    except EspalierError as error:
        _end(f"error: {error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is not None:
            _end(f"error: {show()} Try --help.", 2)
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            raise
        _end(f"error: {error}", 2)
    if code == INTERRUPTED:  # typer hands on a Ctrl-C as this code
        _end("interrupted. Finished steps are kept: run the same command with --resume to go on.", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _end(sentence: str, code: int) -> NoReturn:
    typer.echo(sentence, err=True)
    sys.exit(code)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """espalier's warnings as one line each on standard error; others as Python shows them."""
    from espalier.core.errors import EspalierWarning

    usual = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, EspalierWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            usual(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", EspalierWarning)
        warnings.showwarning = show
        yield


def _prepare(data_dir: Path | None, threads: int | None) -> None:
    if data_dir is not None:
        os.environ["ESPALIER_DATA"] = str(data_dir)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def parse_step(text: str) -> dict[str, Any]:
    """``"prune.prune sparsity=0.9 schedule=cubic"`` -> ``{"prune.prune": {...}}``; values are YAML."""
    import shlex

    import yaml

    words = shlex.split(text)
    if not words:
        raise UsageError("--step is empty; write for example --step 'prune.prune sparsity=0.9'.")
    fields = {}
    for word in words[1:]:
        key, sign, value = word.partition("=")
        if not sign:
            raise UsageError(f"--step {text!r}: {word!r} is not of the form field=value.")
        fields[key] = yaml.safe_load(value)
    return {words[0]: fields}


def _recipe(recipe: str | None, steps: list[str], settings: list[str]) -> Any:
    from espalier import api
    from espalier.core.recipe import Recipe, step_from_data, step_to_data

    if recipe is not None and steps:
        raise UsageError("give --recipe or --step, not both.")
    api.fill_registry()
    chosen = (
        Recipe.from_data([parse_step(step) for step in steps])
        if steps
        else api.named_recipe(recipe or "deep-compression")
    )
    if not settings:
        return chosen
    data = step_to_data(chosen)
    for setting in settings:
        _set(data, setting)
    return step_from_data(data)


def _set(data: dict[str, Any], setting: str) -> None:
    """Apply ``prune.epochs=10`` to a recipe's plain data (part names in between are found by themselves)."""
    import yaml

    from espalier.core.errors import did_you_mean

    path, sign, value = setting.partition("=")
    if not sign:
        raise UsageError(f"--set {setting!r} is not of the form field=value, for example --set prune.epochs=10.")
    node: Any = data
    *parents, last = path.split(".")
    for key in (*parents, None):
        while (
            isinstance(node, dict)
            and len(node) == 1
            and isinstance(next(iter(node.values())), dict)
            and key not in node
        ):
            node = next(iter(node.values()))
        if key is None:
            break
        if not isinstance(node, dict) or key not in node:
            raise UsageError(
                f"--set {setting!r}: there is no {key!r}.{did_you_mean(key, node if isinstance(node, dict) else ())}"
            )
        if isinstance(node[key], str):
            node[key] = {node[key]: {}}
        node = node[key]
    if not isinstance(node, dict) or last not in node:
        raise UsageError(
            f"--set {setting!r}: there is no {last!r}.{did_you_mean(last, node if isinstance(node, dict) else ())}"
        )
    node[last] = yaml.safe_load(value)


@app.command()
def compress(
    project: ProjectFile,
    out: Annotated[
        Path, typer.Option(help="Run directory: new or empty (or an interrupted run, with --resume).")
    ] = Path("runs/first"),
    recipe: Annotated[str | None, typer.Option(help="Recipe id or YAML file [deep-compression].")] = None,
    step: Annotated[list[str] | None, typer.Option(help="A step 'verb.id field=value ...'; repeat for more.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field of the recipe: prune.epochs=10.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Largest file: 10x, 200kB, 1.5MiB.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest drop of the metric on val, in its unit.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to spend; the best so far is kept.")] = None,
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compress a model: to a target, by a recipe, or by single steps."""
    _prepare(data_dir, threads)
    from espalier import api
    from espalier.cli.progress import shown
    from espalier.cli.project import load_project

    with _warnings_as_sentences():
        chosen = _recipe(recipe, step or [], set_ or [])
        loaded = load_project(project)
        with shown(quiet=as_json) as listener:
            result = api.compress(
                loaded.model, loaded.task, chosen, out=out, size=size, max_drop=max_drop, minutes=minutes, seed=seed,
                resume=resume, device=device, models=loaded.models, listener=listener,
            )  # fmt: skip
    (out / PROJECT_NOTE).write_text(f"{project.resolve()}\n")
    _show(result.record, out, as_json=as_json)
    if not result.met:
        raise typer.Exit(3)


Share = Annotated[str | None, typer.Option(help="Share to remove (50%), times less (2x), or what may stay (200k).")]


@app.command()
def prune(
    project: ProjectFile,
    channels: Annotated[str | None, typer.Option(help="Share of the channels of every group to remove: 50%.")] = None,
    parameters: Share = None,
    macs: Share = None,
    size: Share = None,
    ms: Share = None,
    sparsity: Annotated[str | None, typer.Option(help="Share of single weights to mask: 90%.")] = None,
    part: Annotated[
        str | None, typer.Option(help="Of a transformer: heads, width, feed-forward or hidden alone.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="What is unimportant: magnitude, sensitivity, random ...")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="With --sparsity: weights, blocks, n-m, kernel-parts ...")] = None,
    scope: Annotated[str | None, typer.Option(help="layer, global, isomorphic or apart.")] = None,
    schedule: Annotated[str | None, typer.Option(help="one-shot, linear, cubic ...")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs during which the schedule runs.", min=0)] = None,
    finetune: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards.", min=0)] = 0,
    multiple: Annotated[int, typer.Option(help="Round channel counts to multiples of this.", min=1)] = 1,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers by name, type:Conv2d or #0; repeat for more.")
    ] = None,
    analyse: Annotated[
        bool, typer.Option("--analyse", help="Measure first what each group can lose, for the report.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/pruned"),
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prune a model to a target in your units: channels, parameters, MACs, bytes or milliseconds; or mask weights."""
    _prepare(data_dir, threads)
    from espalier import api
    from espalier.cli import prune as pruning
    from espalier.cli.progress import shown
    from espalier.cli.project import load_project
    from espalier.core.recipe import Recipe
    from espalier.train import Finetune

    api.fill_registry()
    amounts = {
        "channels": channels, "parameters": parameters, "macs": macs, "size": size, "ms": ms, "sparsity": sparsity,
    }  # fmt: skip
    fields = {
        "criterion": criterion, "pattern": pattern, "scope": scope, "schedule": schedule, "epochs": epochs,
        "layers": layers or None,
    }  # fmt: skip
    with _warnings_as_sentences():
        loaded = load_project(project)
        step = pruning.build(loaded, amounts, fields, multiple, part, analyse=analyse)
        if dry_run:
            found = pruning.dry_run(project, step, loaded)
            emit(found) if as_json else pruning.show_plan(found)
            return
        recipe = Recipe(steps=(step, Finetune(epochs=finetune))) if finetune else Recipe(steps=(step,))
        with shown(quiet=as_json) as listener:
            result = api.compress(
                loaded.model, loaded.task, recipe, out=out, seed=seed, resume=resume, models=loaded.models,
                listener=listener,
            )  # fmt: skip
    (out / PROJECT_NOTE).write_text(f"{project.resolve()}\n")
    _show(result.record, out, as_json=as_json)


@app.command()
def sensitivity(
    project: ProjectFile,
    levels: Annotated[str, typer.Option(help="Shares of each group to try, in percent.")] = "25,50,75",
    part: Annotated[
        str | None, typer.Option(help="Of a transformer: heads, width, feed-forward or hidden alone.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="What is unimportant: magnitude, sensitivity ...")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers by name, type:Conv2d or #0; repeat for more.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for sensitivity.json; a second call goes on there.")] = Path(
        "runs/sensitivity"
    ),
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show how the metric on val falls as each group of coupled channels loses units; nothing is changed."""
    _prepare(data_dir, threads)
    from espalier import api
    from espalier.cli import prune as pruning
    from espalier.cli.progress import shown
    from espalier.cli.project import load_project

    api.fill_registry()
    fields = {"criterion": criterion, "layers": layers or None}
    with _warnings_as_sentences(), shown(quiet=as_json) as listener:
        found = pruning.sensitivity(load_project(project), fields, part, levels, out, listener)
    emit(found) if as_json else pruning.show_sensitivity(found, out)


def _show(record: dict[str, Any], out: Path, *, as_json: bool) -> None:
    if as_json:
        emit(record)
        return
    from rich.console import Console

    from espalier.report import render_terminal

    render_terminal(record, Console())
    for label, path in (("file", out / "model.espalier"), ("report", out / "report.html")):
        if path.exists():
            say(f"{label:<7} {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train a small network on real digits, compress it, show the result. Needs no network; under a minute."""
    _prepare(None, 1)
    from espalier.cli import example
    from espalier.cli.progress import shown

    with _warnings_as_sentences(), shown(quiet=as_json) as listener:
        result = example.run(out, listener)
    _show(result.record, out, as_json=as_json)


@app.command()
def inspect(project: ProjectFile, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show a model's layers: shapes, parameters, MACs, what a file of it weighs, and its metric on val."""
    _prepare(data_dir, None)
    from espalier.cli.inspection import describe, table
    from espalier.cli.project import load_project

    with _warnings_as_sentences():
        found = describe(load_project(project))
    if as_json:
        emit(found)
        return
    from rich.console import Console

    Console().print(table(found))
    for line in found["summary"]:
        say(line)


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(help="A run directory or an .espalier file that carries its graph.")],
    project: Annotated[
        Path | None, typer.Option(help="Project file of the original, timed beside [the run's own].")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples per call for the throughput.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="torch threads.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls of each model.", min=3)] = 100,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Time the re-loaded file, alternating with the original: median and spread, warm, threads stated."""
    _prepare(data_dir, None)
    from espalier.cli.inspection import bench as bench_file

    note = run / PROJECT_NOTE
    if project is None and note.is_file() and Path(note.read_text().strip()).is_file():
        project = Path(note.read_text().strip())
    found = bench_file(run, project, batch=batch, threads=threads, repeats=repeats)
    if as_json:
        emit(found)
        return
    for name, row in found.items():
        one, many = row["latency"], row["throughput"]
        say(
            f"{name:<12} batch 1: {one['median_ms']:.3f} ms ({one['p10_ms']:.3f} to {one['p90_ms']:.3f})   "
            f"batch {many['batch']}: {many['per_second']:.0f} per second   {one['threads']} threads, {one['runs']} runs"
        )


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run directory, an .espalier file or a project file.")],
    to: Annotated[str, typer.Option(help="onnx, openvino or safetensors.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file to write [model.onnx, .xml, .safetensors beside].")] = None,
    project: Annotated[
        Path | None, typer.Option(help="Project file whose task gives example and metric [the run's own].")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtimes and of torch.", min=1)] = 1,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of an output.", min=0.0)] = 1e-4,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX or OpenVINO; the written file is run, compared with the model and timed beside it."""
    _prepare(data_dir, None)
    from espalier.cli import export as exporting
    from espalier.cli.progress import shown
    from espalier.core.context import Progress

    note = source / PROJECT_NOTE
    if project is None and note.is_file() and Path(note.read_text().strip()).is_file():
        project = Path(note.read_text().strip())
    with _warnings_as_sentences(), shown(quiet=as_json) as listener:

        def tell(what: str, done: int, total: int) -> None:
            if listener is not None:
                listener(Progress("export", what, done, total, {}))

        found = exporting.export(
            source, to, out, project, threads=threads, tolerance=tolerance, progress=tell
        )  # fmt: skip
    if as_json:
        emit(found)
        return
    for line in exporting.lines(found):
        say(line)


@app.command()
def verify(file: File, as_json: Json = False) -> None:
    """Decode a whole file and check every checksum."""
    from espalier.encode import verify as check

    check(file)
    length = file.stat().st_size
    emit({"file": str(file), "bytes": length, "verified": True}) if as_json else say(
        f"{file}: {length} bytes, every tensor decodes and every checksum holds."
    )


@app.command()
def info(file: File, as_json: Json = False) -> None:
    """Show where every byte of a file goes."""
    from espalier.encode import info as describe

    found = describe(file).to_json()
    if as_json:
        emit(found)
        return
    from rich.console import Console

    from espalier.cli.inspection import file_table

    Console().print(file_table(found))


@app.command()
def unpack(
    file: File, out: Annotated[Path, typer.Argument(help="The safetensors file to write.")], as_json: Json = False
) -> None:
    """Decode a file into safetensors."""
    from espalier.encode import unpack as write

    write(file, out)
    emit({"file": str(out), "bytes": out.stat().st_size}) if as_json else say(f"{out}: {out.stat().st_size} bytes")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="verb.id or id: show one method whole.")] = None,
    as_json: Json = False,
) -> None:
    """List every method, or show one: paper, formula, fields."""
    from espalier import api
    from espalier.cli.inspection import describe_method, method_text
    from espalier.core import registry

    api.fill_registry()
    chosen = list(registry.methods()) if name is None else [registry.lookup(name)]
    if as_json:
        emit([describe_method(cls) for cls in chosen])
        return
    if name is not None:
        say(method_text(chosen[0]))
        return
    width = max(len(f"{cls.verb}.{cls.id}") for cls in chosen)
    for cls in chosen:
        say(f"{cls.verb + '.' + cls.id:<{width}}  {cls.kind:<12} {cls.card().summary}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Write a run's report.html again from its record.json, and show the table."""
    from espalier import api
    from espalier.report import load

    record = dict(load(run))
    path = api.write_report(run, record)
    if as_json:
        emit({"report": str(path)})
        return
    _show(record, run, as_json=False)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from espalier import __version__

        say(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


if __name__ == "__main__":
    main()
