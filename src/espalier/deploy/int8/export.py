"""Int8 export: the one call, and what it checks before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from espalier.core.parametrize import plain
from espalier.deploy.export import (
    Tell,
    check_floats,
    checked_target,
    example_call,
    lengths,
    reference_result,
    staged_beside,
)
from espalier.deploy.installed import need
from espalier.deploy.int8.observers import MinMax, ObserverFactory
from espalier.deploy.int8.processor import Processor, this_processor
from espalier.deploy.int8.profile import profile_of
from espalier.deploy.int8.result import TOLERANCE_DB, Int8Exported
from espalier.deploy.signature import signature_of


def to_int8(
    model: nn.Module,
    example: Any,
    calibration: Iterable[Any],
    path: str | Path,
    *,
    runtime: str = "onnxruntime",
    observer: ObserverFactory = MinMax,
    keep_fp32: Sequence[str] = (),
    processor: Processor | None = None,
    reference: nn.Module | None = None,
    tolerance_db: float = TOLERANCE_DB,
    progress: Tell | None = None,
) -> Int8Exported:
    """Export ``model`` with int8 weights and activations, run the file and compare it; ``model`` is not changed.

    Args:
        model: any module. Weights with integer codes keep them; grids of ``torch.fake_quantize_*`` are kept.
        example: as for :func:`~espalier.deploy.to_onnx`.
        calibration: batches, each of the form of ``example``; read once, some hundred samples together.
        path: an ``.onnx`` file, or for ``openvino`` an ``.xml`` file with its ``.bin`` beside it.
        runtime: ``onnxruntime``, ``openvino`` or ``tensorrt``: whose rules the file follows. The first two run it.
        observer: makes what watches one activation and gives its range.
        keep_fp32: names or patterns of layers (or activations: the layers that read them) that stay in fp32.
        processor: what the file is meant for; by default this one. Without 8-bit dot products weights get 7 bits.
        reference: the model in fp32 before any quantization, to compare with as well.
        tolerance_db: least SQNR of the runtime's outputs against the simulation.
        progress: is told ``(what, done, total)``.

    Raises:
        NeedError: a package of the ``deploy`` extra is missing.
        UnknownNameError: there is no such runtime, or no layer for a pattern.
        DataError, NumericError: calibration data that is empty, not finite, or leaves an activation without a range.
        ModelError: the model cannot be exported, nothing of it can be int8, or the file computes something else in its
            runtime than in simulation. Then nothing is written.
    """
    chosen = processor or this_processor()
    profile = profile_of(runtime, chosen)
    target = checked_target(path, ".xml" if runtime == "openvino" and Path(path).suffix == ".xml" else ".onnx")
    need("the int8 export", "onnx", "onnxscript", "onnxruntime", *([runtime] if profile.runs else []))
    tell = progress or (lambda *_: None)
    bare = plain(model).cpu().eval().requires_grad_(requires_grad=False)
    call = example_call(bare, example)
    check_floats(bare, call)
    signature = signature_of(bare, *call, reference_result(bare, call))
    from espalier.deploy.int8.job import Job

    with staged_beside(target) as staged:
        job = Job(profile=profile, processor=chosen, signature=signature, staged=staged, bare=bare, keep_fp32=keep_fp32)
        tell("export", 0, 4)
        job.prepare(call)
        tell("calibrate", 1, 4)
        job.write(model, calibration, observer, lambda count: tell(f"calibrate, batch {count}", 1, 4))
        tell("compare", 2, 4)
        job.count()
        tell("compare", 3, 4)
        job.compare(reference, tolerance_db)
        sizes = lengths(staged.parent)
    tell("compare", 4, 4)
    return Int8Exported(
        path=target, kind="openvino" if target.suffix == ".xml" else "onnx", runtime=runtime, files=sizes,
        coverage=job.coverage, agreement=job.agreement, free_batch=job.free_batch, bits=job.bits,
        processor=str(chosen), inputs=signature.inputs, outputs=signature.outputs, notes=job.notes,
    )  # fmt: skip
