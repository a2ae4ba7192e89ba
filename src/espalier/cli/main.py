"""The ``espalier`` command. Heavy imports happen inside the commands: ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from espalier.cli.common import (
    MISSED,
    DataDir,
    File,
    Json,
    KeepFp32,
    ProjectFile,
    Resume,
    Threads,
    Watching,
    emit,
    noted_project,
    prepare,
    say,
    show_record,
    tell,
    warnings_as_sentences,
)
from espalier.cli.prune import prune
from espalier.cli.quantize import quantize
from espalier.cli.sensitivity import sensitivity

app = typer.Typer(
    name="espalier",
    help="The smallest, fastest network that is still good enough: as a file, with the proof and the picture.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point: errors become one sentence and an exit code (2 wrong use or input, 3 target missed, 130 Ctrl-C)."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is not None:
            _end(f"error: {show()} Try --help.", 2)
        from espalier.cli.failures import explained

        _end(*explained(error))
    if code == INTERRUPTED:  # typer hands on a Ctrl-C as this code
        _end(
            "interrupted. What is finished is kept: the same command goes on there, with --resume where it has one.",
            INTERRUPTED,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _end(sentence: str, code: int) -> NoReturn:
    tell(sentence)
    sys.exit(code)


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
    resume: Resume = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compress a model: to a target, by a recipe, or by single steps."""
    prepare(data_dir, threads)
    from espalier.cli import recipes
    from espalier.cli.project import load_project
    from espalier.cli.running import run

    with warnings_as_sentences():
        wanted = recipes.chosen(recipe, step or [], set_ or [])
        loaded = load_project(project)
        result = run(
            loaded, wanted, project, out, seed=seed, resume=resume, quiet=as_json, size=size, max_drop=max_drop,
            minutes=minutes, device=device,
        )  # fmt: skip
    show_record(result.record, out, as_json=as_json)
    if not result.met:
        raise typer.Exit(MISSED)


app.command()(prune)
app.command()(quantize)
app.command()(sensitivity)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train a small network on real digits, compress it, show the result. Needs no network; under a minute."""
    prepare(None, 1)
    from espalier.cli import example
    from espalier.cli.progress import shown

    with warnings_as_sentences(), shown(quiet=as_json) as listener:
        result = example.run(out, listener)
    show_record(result.record, out, as_json=as_json)


@app.command()
def inspect(
    project: ProjectFile,
    quantization: Annotated[
        str | None, typer.Option(help="Also measure each layer's sensitivity at so many bits: 4, or 4/8 with inputs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder where a stopped sensitivity analysis goes on.")] = Path(
        "runs/sensitivity"
    ),
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers: shapes, parameters, MACs, what a file of it weighs, and its metric on val."""
    prepare(data_dir, None)
    from espalier.cli.inspection import describe, table
    from espalier.cli.project import load_project

    with warnings_as_sentences():
        found = describe(load_project(project), quantization, out)
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
    prepare(data_dir, None)
    from espalier.cli.inspection import bench as bench_file

    found = bench_file(run, project or noted_project(run), batch=batch, threads=threads, repeats=repeats)
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
    to: Annotated[str, typer.Option(help="onnx, openvino, executorch, safetensors, or int8 for a runtime.")] = "onnx",
    weights: Annotated[
        str, typer.Option(help="How they are stored: fp32, fp16 or bf16. Half the bytes, the same speed.")
    ] = "fp32",
    runtime: Annotated[str | None, typer.Option(help="Of int8: onnxruntime, openvino or tensorrt.")] = None,
    keep_fp32: KeepFp32 = None,
    observer: Watching = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write [model.onnx, .xml, .pte, .safetensors beside].")
    ] = None,
    project: Annotated[
        Path | None, typer.Option(help="Project file whose task gives example and metric [the run's own].")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtimes and of torch.", min=1)] = 1,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of an output.", min=0.0)] = 1e-4,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Export to ONNX, OpenVINO, ExecuTorch or int8; the file is run, compared with the model and timed beside it."""
    prepare(data_dir, None)
    from espalier.cli import export as exporting
    from espalier.cli.progress import shown, telling

    with warnings_as_sentences(), shown(quiet=as_json) as listener:
        found = exporting.export(
            source, to, out, project or noted_project(source), threads=threads, tolerance=tolerance, weights=weights,
            runtime=runtime, keep_fp32=keep_fp32, observer=observer, progress=telling(listener, "export"),
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
    show_record(record, run, as_json=False)


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
