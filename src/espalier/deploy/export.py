"""Export: write into a folder beside, run what was written, compare, and only then move it into place."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError, UsageError, did_you_mean
from espalier.core.files import written_to
from espalier.core.model import evaluating
from espalier.core.parametrize import plain
from espalier.core.task import Task, capture_call, to_device
from espalier.deploy import runtimes
from espalier.deploy.check import TOLERANCE, Call, Check, batch_of, check, largest
from espalier.deploy.installed import need
from espalier.deploy.onnx_writer import OPSET, write_onnx
from espalier.deploy.openvino_writer import write_openvino
from espalier.deploy.runtimes import first_line
from espalier.deploy.safetensors_writer import write_safetensors
from espalier.deploy.signature import Signature, signature_of, tensors_in
from espalier.deploy.sixteen_bits import Storage, check_weights, compare, round_state, write_16bit
from espalier.graph import Runner, Value
from espalier.graph.trees import fill

Tell = Callable[[str, int, int], None]
OTHER_BATCHES = (1, 3)
"""Besides the example as it is: the usual deployment, and one that no exporter can have baked in."""


@dataclass(frozen=True)
class Exported:
    """What was written and how far it is from the model, measured on the files.

    ``files``: every file with its length in bytes. ``free_batch``: whether other batch sizes than the example's run.
    ``checks``: one per runtime and batch size. ``storage``: of weights in 16 bits; then ``checks`` compare with the
    same weights rounded in fp32, and ``storage.sqnr`` tells how far that is from the model.
    """

    path: Path
    kind: str
    files: Mapping[str, int]
    checks: tuple[Check, ...] = ()
    tolerance: float = TOLERANCE
    free_batch: bool = True
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    opset: int | None = None
    notes: tuple[str, ...] = field(default=())
    storage: Storage | None = None

    @property
    def weights(self) -> str:
        """How the floating-point weights are stored: ``fp32``, ``fp16`` or ``bf16``."""
        return "fp32" if self.storage is None else self.storage.weights

    @property
    def bytes(self) -> int:
        """Length of all files together."""
        return sum(self.files.values())

    @property
    def difference(self) -> float:
        """Largest relative difference of any output from the model, over all checks."""
        return largest(self.checks)

    def to_json(self) -> dict[str, Any]:
        """As plain data; an SQNR of infinity (equal outputs) is null."""
        found = {**asdict(self), "path": str(self.path), "bytes": self.bytes, "difference": self.difference,
                 "weights": self.weights}  # fmt: skip
        if self.storage is not None and not math.isfinite(self.storage.sqnr or 0.0):
            found["storage"]["sqnr"] = None
        return found


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    runtime: str | Sequence[str] | None = None,
    weights: str = "fp32",
    tolerance: float = TOLERANCE,
    external_data: bool | None = None,
    progress: Tell | None = None,
) -> Exported:
    """Export ``model`` to an ONNX file that computes in fp32, run it and compare it; ``model`` is not changed.

    Args:
        model: any module; training forms are baked into plain weights first.
        example: a tensor, a tuple of positional or a dict of keyword arguments, or a ``Task`` (its first batch);
            None for a ``Runner``, which knows its inputs. The first axis is the batch and is left open.
        path: the ``.onnx`` file; weights above 1.9 GB go into ``path.data``.
        runtime: where the file is run and compared; by default every installed one.
        weights: how they are stored: ``fp32``, or ``fp16`` or ``bf16``, widened to fp32 where they are read. That
            halves the file and speeds nothing up. Tensors of fewer than 256 elements stay fp32.
        tolerance: largest allowed difference of an output, relative to its largest value.
        external_data: weights in ``path.data`` in any case, or never.
        progress: is told ``(what, done, total)``.

    Raises:
        NeedError: a package of the ``deploy`` extra is missing.
        NumericError: a weight is larger than fp16 can hold.
        ModelError: the model cannot be exported, or the file computes something else. Then nothing is written.
    """
    return _export("onnx", model, example, path, runtime, weights, tolerance, external_data, progress)


def to_openvino(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    weights: str = "fp32",
    tolerance: float = TOLERANCE,
    progress: Tell | None = None,
) -> Exported:
    """Export ``model`` to OpenVINO's ``path`` (``.xml``) and ``.bin``; otherwise as :func:`to_onnx`.

    ``weights`` is what the file stores; what OpenVINO computes in is said when it is opened, by ``precision``.
    """
    return _export("openvino", model, example, path, "openvino", weights, tolerance, None, progress)


def to_safetensors(model: nn.Module, path: str | Path, *, weights: str = "fp32") -> Exported:
    """Write the plain model's state, dense, to a safetensors file and check it bit for bit.

    ``weights``: as for :func:`to_onnx`; what reads the file widens them, as ``load_state_dict`` does.
    """
    target = checked_target(path, ".safetensors")
    check_weights(weights)
    bare, storage = plain(model).cpu(), None
    with staged_beside(target) as staged:
        write_safetensors(bare, staged)
        if weights != "fp32":
            before = lengths(staged.parent)
            storage = replace(round_state(bare, weights), fp32_bytes=sum(before.values()))
            write_safetensors(bare, staged)
        sizes = lengths(staged.parent)
    notes = storage.said(sum(sizes.values()), ()) if storage is not None else ()
    return Exported(target, "safetensors", sizes, notes=notes, storage=storage)


KINDS = {"onnx": ".onnx", "openvino": ".xml", "safetensors": ".safetensors"}


def _export(
    kind: str, model: nn.Module, example: Any, path: str | Path, runtime: str | Sequence[str] | None, weights: str,
    tolerance: float, external: bool | None, progress: Tell | None,
) -> Exported:  # fmt: skip
    target = checked_target(path, KINDS[kind])
    check_weights(weights)
    chosen = _runtimes(kind, runtime)
    need(f"the {'ONNX' if kind == 'onnx' else 'OpenVINO'} export", "onnx", "onnxscript", *chosen)
    tell = progress or (lambda *_: None)
    total = 2 + len(chosen)
    tell("export", 0, total)
    bare = plain(model).cpu().eval().requires_grad_(requires_grad=False)
    call = example_call(bare, example)
    check_floats(bare, call)
    result = reference_result(bare, call)
    signature = signature_of(bare, *call, result)
    judge, storage = judge_of(model, bare), None
    checks: list[Check] = []
    with staged_beside(target) as staged, tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        apart = Path(scratch)
        wide = staged if weights == "fp32" else apart / "fp32" / target.name
        first = wide if kind == "onnx" else apart / f"{target.stem}.onnx"
        free, notes = write_onnx(bare, signature, signature.bind(*call), first, external=external)
        if kind == "openvino":
            write_openvino(first, signature, wide)
        tell("export", 1, total)
        batches = [n for n in OTHER_BATCHES if n != batch_of(call)] if free else []
        for done, name in enumerate(chosen, 2):
            tell("export", done, total)
            session = runtimes.open(wide, name)
            checks += check(judge, session, call, batches=batches, tolerance=tolerance)
            del session  # some systems do not move a file that is open
        if weights != "fp32":
            storage, checks = _in_16_bits(
                kind, first, staged, apart, signature, judge, call, checks, weights, tolerance, external
            )
            storage = replace(storage, fp32_bytes=sum(lengths(wide.parent).values()))
        sizes = lengths(staged.parent)
    if storage is not None:
        notes = [*notes, *storage.said(sum(sizes.values()), chosen)]
    tell("export", total, total)
    return Exported(
        target, kind, sizes, tuple(checks), tolerance, free, signature.inputs, signature.outputs, OPSET, tuple(notes),
        storage,
    )  # fmt: skip


def _in_16_bits(
    kind: str, source: Path, staged: Path, apart: Path, signature: Signature, model: nn.Module, call: Call,
    passed: Sequence[Check], weights: str, tolerance: float, external: bool | None,
) -> tuple[Storage, list[Check]]:  # fmt: skip
    """Write ``staged`` from the fp32 ONNX file ``source`` and compare it with its fp32 form with rounded weights.

    That form runs the same graph as the fp32 file, which ``passed`` its comparison with the model, with other numbers.
    The exporter folds norms into weights and transposes some, so rounding the model's own would not be the same.
    """
    folder = apart / "rounded"
    rounded = folder / (staged.name if kind == "onnx" else source.name)
    narrow = staged if kind == "onnx" else apart / "narrow" / source.name
    storage = write_16bit(source, narrow, rounded, weights, external=external)
    if kind == "openvino":
        write_openvino(narrow, signature, staged)
        write_openvino(rounded, signature, folder / staged.name)
    checks: list[Check] = []
    for name in dict.fromkeys(each.runtime for each in passed):
        reference, session = (runtimes.open(file, name) for file in (folder / staged.name, staged))
        batches = [each.batch for each in passed if each.runtime == name]
        storage, found = compare(storage, model, reference, session, call, batches, tolerance)
        checks += found
        del reference, session
    return storage, checks


def judge_of(model: nn.Module, bare: nn.Module) -> nn.Module:
    """The model to compare with: the user's own where it is on the CPU, so that its hooks count; else the copy."""
    tensors = (*model.parameters(), *model.buffers())
    return model if all(t.device.type == "cpu" for t in tensors) else bare


def example_call(model: nn.Module, example: object) -> Call:
    """``(args, kwargs)`` on the CPU from what a user gives as an example."""
    if example is None:
        if not isinstance(model, Runner):
            raise UsageError("an example input is needed: a tensor, a tuple, a dict of keywords, or a Task.")
        return _runner_call(model)
    if isinstance(example, Task):
        return capture_call(example, model, to_device(example.example(), torch.device("cpu")))
    moved = to_device(example, torch.device("cpu"))
    if isinstance(moved, Tensor):
        return (moved,), {}
    if isinstance(moved, Mapping):
        return (), dict(moved)
    if isinstance(moved, tuple | list):
        return tuple(moved), {}
    raise UsageError(
        f"an example is a tensor, a tuple of arguments, a dict of keywords or a Task; got {type(example).__name__}."
    )


def _runner_call(model: Runner) -> Call:
    """A call that fits a runner's inputs: normal numbers, zeros for integers."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for item in model.graph.inputs:
        shape = [2 if size is None else size for size in item.shape]
        dtype = getattr(torch, item.dtype)
        drawn = torch.randn(shape, generator=generator)
        values.append(drawn.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype))
    args, kwargs = fill(model.graph.call, lambda leaf: values[leaf.index] if isinstance(leaf, Value) else None)
    return args, kwargs


def check_floats(model: nn.Module, call: Call) -> None:
    """Raises ``ModelError`` for floats narrower than fp32."""
    narrow = sorted({str(t.dtype).removeprefix("torch.") for t in (*model.parameters(), *tensors_in(call))
                     if t.is_floating_point() and t.dtype.itemsize < 4})  # fmt: skip
    if narrow:
        raise ModelError(f"the export is fp32; this model or its example is {', '.join(narrow)}. Call model.float().")


def reference_result(model: nn.Module, call: Call) -> Any:
    """What ``model`` gives for ``call``. Raises ``ModelError`` with its own reason where it does not run."""
    try:
        with evaluating(model):
            return model(*call[0], **call[1])
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the example: {type(error).__name__}: {first_line(error)} "
            "Check the example's shapes and dtypes."
        ) from error


def _runtimes(kind: str, asked: str | Sequence[str] | None) -> list[str]:
    readers = [name for name, suffixes in runtimes.SUFFIXES.items() if KINDS[kind] in suffixes]
    if asked is None:
        found = [name for name in readers if name in runtimes.available()]
        return found or readers[:1]
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in readers:
            raise UsageError(f"{name!r} does not run {kind} files.{did_you_mean(name, readers)}")
    if not names:
        raise UsageError(f"an exported file is always run: name a runtime of {', '.join(readers)}.")
    return names


def checked_target(path: str | Path, suffix: str) -> Path:
    """``path``, which must end in ``suffix``. Raises ``UsageError``."""
    target = Path(path)
    if target.suffix != suffix:
        raise UsageError(f"the file must end in {suffix}; got {target.name!r}.")
    return target


@contextmanager
def staged_beside(target: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside; all that stands there is moved into place at a good end."""
    with written_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-")
    with folder:
        yield Path(folder.name) / target.name
        with written_to(target):
            for file in sorted(Path(folder.name).iterdir(), key=lambda f: f.name == target.name):
                os.replace(file, target.parent / file.name)  # noqa: PTH105 - the atomic call, by its name


def lengths(folder: Path) -> dict[str, int]:
    """Every file of a folder with its length in bytes."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
