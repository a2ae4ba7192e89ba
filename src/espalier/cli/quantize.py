"""``espalier quantize``: few bits for weights, inputs and gradients; or int8 for a runtime, written and timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.cli.common import (
    DataDir,
    Json,
    KeepFp32,
    Layers,
    ProjectFile,
    Resume,
    Threads,
    Watching,
    prepare,
    say,
    show_record,
    warnings_as_sentences,
)
from espalier.core.errors import UsageError

if TYPE_CHECKING:
    from espalier.api import Result
    from espalier.cli.project import Project
    from espalier.quantize.parts import Observer

PART = "A name, or a name with fields: '{twn: {solution: exact}}'."
Quantizer = Annotated[str | None, typer.Option(help=PART)]
Width = Annotated[str | None, typer.Option(help="Bits: 4, or by layer: '{conv1: 8, \"*\": 4}'.")]


def quantize(
    project: ProjectFile,
    int8: Annotated[
        bool, typer.Option("--int8", help="Post-training int8 of the whole network, exported and timed.")
    ] = False,
    runtime: Annotated[str | None, typer.Option(help="With --int8: onnxruntime, openvino or tensorrt.")] = None,
    keep_fp32: KeepFp32 = None,
    observer: Watching = None,
    weights: Quantizer = None,
    bits: Width = None,
    activations: Quantizer = None,
    activation_bits: Width = None,
    gradients: Quantizer = None,
    gradient_bits: Annotated[int | None, typer.Option(help="Bits of the weights' gradients.", min=1)] = None,
    errors: Quantizer = None,
    error_bits: Annotated[int | None, typer.Option(help="Bits of what is propagated back.", min=1)] = None,
    scheme: Annotated[
        list[str] | None, typer.Option(help="two-stage, progressive or guided; repeat to compose.")
    ] = None,
    ends: Annotated[
        str | None, typer.Option(help="First and last layer: bits at least, same or float.", show_default="8")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training with quantized values.", min=0)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of that training.")] = None,
    layers: Layers = None,
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/quantized"),
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    resume: Resume = False,
    data_dir: DataDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Quantize a model: any method of the literature in any number of bits, or int8 that runs faster here."""
    prepare(data_dir, threads)
    from espalier import api
    from espalier.cli.project import load_project
    from espalier.cli.running import run
    from espalier.core.recipe import Recipe

    api.fill_registry()
    given: dict[str, Any] = {
        "weights": read(weights), "bits": read(bits), "activations": read(activations),
        "activation_bits": read(activation_bits), "gradients": read(gradients), "gradient_bits": gradient_bits,
        "errors": read(errors), "error_bits": error_bits, "schemes": [read(s) for s in scheme or ()] or None,
        "ends": read(ends), "epochs": epochs, "lr": lr, "layers": layers or None,
    }  # fmt: skip
    fields = {name: value for name, value in given.items() if value is not None}
    with warnings_as_sentences():
        check_options(fields, runtime, int8=int8, keep_fp32=keep_fp32, observer=observer)
        watching = observer_of(observer)
        if watching is not None:
            fields["observer"] = read(observer)
        loaded = load_project(project)
        recipe = Recipe(steps=(step(fields, int8=int8),))
        result = run(loaded, recipe, project, out, seed=seed, resume=resume, quiet=as_json)
        if int8:
            deploy(
                result, loaded, project, out, runtime, keep_fp32=keep_fp32 or (), observer=watching, threads=threads,
                quiet=as_json,
            )  # fmt: skip
    show_record(result.record, out, as_json=as_json)
    for line in covered(result.record) if not as_json else ():
        say(line)


def deploy(
    result: Result, loaded: Project, project: Path, out: Path, runtime: str | None, *, keep_fp32: Sequence[str],
    observer: Observer | None, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Write the int8 file of a run's result into its folder, and what was measured of it into record and report."""
    from espalier import api
    from espalier.cli.int8 import export_int8
    from espalier.cli.progress import shown, telling
    from espalier.cli.project import load_result
    from espalier.core.files import write_atomic

    model, _ = load_result(out / "model.espalier", project, codes=True)
    with shown(quiet=quiet) as listener:
        result.record["int8"] = export_int8(
            model, loaded, out, runtime, keep_fp32=keep_fp32, threads=threads or 1, observer=observer,
            progress=telling(listener, "int8"),
        )  # fmt: skip
    write_atomic(out / "record.json", json.dumps(result.record, indent=1).encode())
    api.write_report(out, result.record)


def read(text: str | None) -> Any:
    """An option as plain data: a name, a number, or a mapping in YAML. Raises ``UsageError`` for anything else."""
    import yaml

    if text is None:
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{text!r} is not understood: write a name, a number, or a mapping such as {{a: 1}}."
        ) from error


def check_options(
    fields: dict[str, Any], runtime: str | None, *, int8: bool, keep_fp32: list[str] | None = None,
    observer: str | None = None,
) -> None:  # fmt: skip
    """Raise ``UsageError`` for options that have no say together."""
    if observer is not None and not int8:
        raise UsageError(
            "--observer calibrates an int8 file; give --int8 as well, or name it in the input quantizer: --activations "
            f"'{{affine-input: {{observer: {observer}}}}}'."
        )
    if keep_fp32 and not int8:
        raise UsageError("--keep-fp32 names layers that an int8 file leaves in fp32; give --int8 as well.")
    if runtime is not None:
        from espalier.cli.int8 import check_runtime

        check_runtime(runtime)
    if runtime is not None and not int8:
        raise UsageError("--runtime says where the int8 file is to run; give --int8 as well.")
    if int8:
        clashing = [name for name in fields if name != "layers"]
        if clashing:
            option = clashing[0].replace("_", "-").replace("schemes", "scheme")
            raise UsageError(
                f"--int8 chooses methods and bits itself; --{option} has no say. Leave one of the two out."
            )


def step(fields: dict[str, Any], *, int8: bool) -> Any:
    """The step that the options describe."""
    from espalier.core.recipe import step_from_data

    return step_from_data({"quantize.ptq-int8" if int8 else "quantize.quantize": fields})


def observer_of(text: str | None) -> Observer | None:
    """What ``--observer`` names. Raises ``UnknownNameError`` or ``UsageError`` for what is none."""
    if text is None:
        return None
    found: Observer = step({"observer": read(text)}, int8=True).observer
    return found


def covered(record: dict[str, Any]) -> list[str]:
    """How much is quantized, in a line, and what is not."""
    found = [row for row in record["steps"] if "coverage" in row.get("details", {})]
    if not found:
        return []
    detail = found[-1]["details"]["coverage"]
    layers, share, inputs = detail["layers"], 100 * detail["parameters"], len(detail["inputs"])
    macs = f" and {100 * detail['macs']:.1f} % of the multiply-adds" if detail.get("macs") is not None else ""
    said = [f"covered {layers} layers, {share:.1f} % of the parameters{macs}; {inputs} inputs"]
    return said + [f"left    {row['name']}: {row['reason']}" for row in found[-1].get("skipped", ())]
