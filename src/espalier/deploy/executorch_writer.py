"""A torch module as an ExecuTorch file for XNNPACK: exported, its grids said in int8, lowered, run, compared."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from espalier.core.errors import DataError, EspalierError, ModelError, NumericError
from espalier.core.files import write_atomic
from espalier.core.model import evaluating
from espalier.core.parametrize import freeze, plain
from espalier.deploy import runtimes
from espalier.deploy.check import ROUNDED_DB, TOLERANCE, Call, batch_of, check, resized, sqnr
from espalier.deploy.executorch_grids import has_codes, has_grids, rewritten
from espalier.deploy.executorch_session import ABOUT, Calling, silent
from espalier.deploy.export import (
    OTHER_BATCHES,
    Exported,
    Tell,
    check_floats,
    checked_target,
    example_call,
    judge_of,
    lengths,
    reference_result,
    staged_beside,
)
from espalier.deploy.installed import need, quiet
from espalier.deploy.int8.weights import fixed_codes
from espalier.deploy.onnx_writer import ROOT, exported_program
from espalier.deploy.runtimes import first_line
from espalier.deploy.signature import Signature, signature_of, tensors_in
from espalier.graph.quiet import quiet as quiet_tracer

ROOM = max(OTHER_BATCHES)
"""Samples that a file has memory for at least, so that other batches than the example's can be checked."""

LOOSE = 1e9
"""In the place of a tolerance where the SQNR is what counts; other shapes and NaN are still refused."""


def to_executorch(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    calibration: Iterable[Any] | None = None,
    tolerance: float = TOLERANCE,
    progress: Tell | None = None,
) -> Exported:
    """Export ``model`` to an ExecuTorch ``.pte`` file for XNNPACK, run it and compare it; ``model`` is not changed.

    Layers whose inputs and weights stand on grids of 8 bits or fewer, as after ``quantize.ptq-int8``, become int8.

    Args:
        model: any module; training forms are baked into plain weights first.
        example: as for :func:`~espalier.deploy.to_onnx`. The batch is open from 1 to the example's, at least 3, where
            the model allows it; the file reserves memory for the largest.
        path: the ``.pte`` file.
        calibration: batches of the form of ``example``, for int8 layers whose results have no grid in the model; by
            default the example alone.
        tolerance: largest allowed difference of an output, relative to its largest value. A model that rounds is held
            to an SQNR of 25 dB instead.
        progress: is told ``(what, done, total)``.

    Raises:
        NeedError: the ``executorch`` extra is missing.
        DataError, NumericError: calibration data that is empty, or with which a result is not finite.
        ModelError: the model cannot be exported, or the file computes something else. Then nothing is written.
    """
    target = checked_target(path, ".pte")
    need("the ExecuTorch export", "executorch")
    tell = progress or (lambda *_: None)
    tell("export", 0, 3)
    bare = plain(model).cpu().eval().requires_grad_(requires_grad=False)
    call = example_call(bare, example)
    check_floats(bare, call)
    signature = signature_of(bare, *call, reference_result(bare, call))
    with staged_beside(target) as staged:
        job = _Job(model, bare, signature, call, calibration, staged)
        written = job.write()
        tell("export", 1, 3)
        session = runtimes.open(staged, "executorch")
        reference = judge_of(model, bare)
        free = written.largest is not None
        batches = [n for n in OTHER_BATCHES if free and n != batch_of(call)]
        tell("compare", 2, 3)
        checks = check(reference, session, call, batches=batches, tolerance=LOOSE if written.rounds else tolerance)
        notes = written.notes
        if written.rounds:
            agreed = min(_agreement(reference, session.module(), call, each.batch) for each in checks)
            said = f"{agreed:.1f} dB from" if math.isfinite(agreed) else "equal to"
            notes = (*notes, f"outputs {said} the model's, which rounds its activations")
        del session
        sizes = lengths(staged.parent)
    tell("compare", 3, 3)
    return Exported(
        target, "executorch", sizes, tuple(checks), tolerance, free, signature.inputs, signature.outputs, notes=notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Written:
    """``largest`` batch, None where it is fixed; ``rounds``: there are grids in it."""

    largest: int | None
    rounds: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """One export under way: ``bare`` is ``model`` with its forms baked in, called by ``call``."""

    model: nn.Module
    bare: nn.Module
    signature: Signature
    call: Call
    calibration: Iterable[Any] | None
    path: Path
    seen: list[Call] = field(default_factory=list)

    def write(self) -> _Written:
        """Write the file, with the batch open where both torch and ExecuTorch take it so. Raises ``ModelError``."""
        size = batch_of(self.call)
        largest = max(size or 1, ROOM)
        program, free, notes = self._exported(Dim("batch", min=1, max=largest))
        if free:
            try:
                return self._lowered(
                    program, largest,
                    [f"the batch is open from 1 to {largest}: the file reserves memory for that many samples"],
                )  # fmt: skip
            except EspalierError:
                raise
            except Exception as error:
                program, _, _ = self._exported(None)
                notes = [f"the batch is fixed at {size}: {first_line(error)}"]
        try:
            return self._lowered(program, None, notes or [f"the batch is fixed at {size}"])
        except EspalierError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(self.bare).__name__} cannot be exported to ExecuTorch: {type(error).__name__}: "
                f"{first_line(error)} Export to ONNX, or report the model."
            ) from error

    def _exported(self, batch: Any) -> tuple[ExportedProgram, bool, list[str]]:
        return exported_program(self.bare, self.signature, self.signature.bind(*self.call), batch=batch)

    def _lowered(self, program: ExportedProgram, largest: int | None, notes: Sequence[str]) -> _Written:
        with quiet(), silent():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        changed = None
        if has_grids(program.graph):
            with torch.no_grad(), quiet(), quiet_tracer():
                fixed = {each.name: each for each in fixed_codes(*freeze(self.model))}
                flat = self._calibration(fixed_batch=largest is None)
                changed = rewritten(program.module(check_guards=False), fixed, flat, f"{ROOT}.")
                program = _again(program, changed.module, largest)
        calling = _calling(program, self.signature, largest)
        with quiet(), quiet_tracer(), silent():
            edge = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods={ABOUT: calling.to_json()}
            )
            share = _share(edge.exported_program().graph_module)
            data = edge.to_executorch().buffer
        write_atomic(self.path, data)
        notes = [*notes, share.said()]
        if changed is not None:
            notes.append(f"{share.int8} of {changed.of_layers} layers run in int8{_reasons(changed.left)}")
            if changed.observed:
                count = changed.observed
                notes.append(f"{count} result{'s' * (count > 1)} without a grid in the model got one by calibration")
        return _Written(largest, changed is not None, tuple(notes))

    def _calibration(self, *, fixed_batch: bool) -> list[list[Tensor]]:
        """Inputs to see ranges on, read once."""
        if not self.seen:
            batches = self.calibration
            self.seen.extend([self.call] if batches is None else (example_call(self.bare, each) for each in batches))
        if not self.seen:
            raise DataError("calibration gave no batches; give some, or leave it out to calibrate on the example.")
        tensors = [x for x in tree_leaves(self.seen) if isinstance(x, Tensor)]
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise NumericError("the calibration data holds values that are not finite; leave those out.")
        size = batch_of(self.call) or 1
        return [self.signature.bind(*(resized(each, size) if fixed_batch else each)) for each in self.seen]


def _again(program: ExportedProgram, module: fx.GraphModule, largest: int | None) -> ExportedProgram:
    """The changed module of a program exported as that was."""
    args, kwargs = program.example_inputs
    batch = Dim("batch", min=1, max=largest)
    shapes = tuple({0: batch} if shape[:1] == (None,) else None for shape in _shapes(program))
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _shapes(program: ExportedProgram, *, results: bool = False) -> tuple[tuple[int | None, ...], ...]:
    """Of the inputs or results, with None where a size is open."""
    signature = program.graph_signature
    names = signature.user_outputs if results else signature.user_inputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    return tuple(
        tuple(n if isinstance(n, int) else None for n in values[name].shape) if isinstance(name, str) else ()
        for name in names
    )


def _calling(program: ExportedProgram, signature: Signature, largest: int | None) -> Calling:
    found = tuple(shape[:1] == (None,) for shape in _shapes(program, results=True))
    return Calling(signature, _shapes(program), found, largest)


def _reasons(left: Mapping[str, str]) -> str:
    """``left``: layer -> why it stays in fp32."""
    said = ""
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said += f"; in fp32: {', '.join(names[:3])}{more} ({reason})"
    return said


@dataclass(frozen=True)
class _Share:
    """Operators by name that XNNPACK runs, and that are left; ``int8``: its layers with weights in 8 bits."""

    taken: Mapping[str, int]
    left: Mapping[str, int]
    int8: int

    def said(self) -> str:
        """As a sentence."""
        here, there = sum(self.taken.values()), sum(self.left.values())
        said = f"XNNPACK runs {here} of {here + there} operators"
        if self.taken:
            said += f" ({_counted(self.taken)})"
        return said + (f"; ExecuTorch's own kernels run the rest ({_counted(self.left)})" if self.left else "")


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _share(module: fx.GraphModule) -> _Share:
    taken: Counter[str] = Counter()
    left = Counter(_operators(module.graph))
    int8 = 0
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("lowered_module"):
            inner = getattr(module, str(node.target)).original_module.graph
            taken.update(_operators(inner, fused=True))
            int8 += sum(has_codes(each) for each in inner.nodes)
    return _Share(taken, left, int8)


def _operators(graph: fx.Graph, *, fused: bool = False) -> Iterator[str]:
    """Names of the operators on tensors in a graph; ``fused``: without those that only say what int8 is."""
    for node in graph.nodes:
        if node.op != "call_function" or isinstance(node.target, type(len)):
            continue
        name = str(getattr(node.target, "__name__", node.target))
        if name in ("executorch_call_delegate", "getitem", "alloc") or "sym_" in name or (fused and "quantize" in name):
            continue
        yield re.sub(r"\.(default|Tensor|int|dim)$", "", name.removeprefix("aten."))


def _agreement(model: nn.Module, deployed: nn.Module, call: Call, batch: int | None) -> float:
    """The least SQNR of any output in dB at ``batch`` samples. Raises ``ModelError`` where it is too low."""
    args, kwargs = call if batch is None else resized(call, batch)
    with evaluating(model):
        wanted = tensors_in(model(*args, **kwargs))
    found = min(sqnr([w], [g]) for w, g in zip(wanted, tensors_in(deployed(*args, **kwargs)), strict=True))
    if found < ROUNDED_DB:
        raise ModelError(
            f"the exported file disagrees with the model in executorch: {found:.1f} dB at batch {batch}, "
            f"{ROUNDED_DB:g} dB are needed. No file was written. Calibrate on more data, or export to ONNX."
        )
    return found
