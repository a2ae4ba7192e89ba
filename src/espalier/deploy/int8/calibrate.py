"""The fp32 file run on calibration batches, with the tensors that get a grid as extra results.

One batch is in memory at a time; what is kept of it is the observers' business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from espalier.core.errors import DataError, EspalierError, NumericError
from espalier.core.model import evaluating
from espalier.deploy.check import Call
from espalier.deploy.installed import need, quiet
from espalier.deploy.int8.grid import Grid, from_range
from espalier.deploy.int8.markers import FUNCTION
from espalier.deploy.int8.observers import Observer, ObserverFactory
from espalier.deploy.int8.places import Places
from espalier.deploy.int8.profile import RuntimeProfile
from espalier.deploy.onnx_writer import save_onnx
from espalier.deploy.runtimes import Array, first_line
from espalier.deploy.signature import Signature, tensors_in

AsCall = Callable[[Any], Call]
LOOKED_AT = 16
"""Batches kept (their inputs only) for the comparison of the finished file with the model."""


def calibrate(
    model: ir.Model, places: Places, batches: Iterable[Any], as_call: AsCall, signature: Signature, folder: Path,
    profile: RuntimeProfile, observer: ObserverFactory, tell: Callable[[int], None],
) -> tuple[dict[ir.Value, Grid], list[Call]]:  # fmt: skip
    """A grid for every leader of ``places``, and the first calls, for comparison.

    Raises ``DataError`` for no batches, ``NumericError`` for NaN or infinity in an input or activation, and for ranges
    without a scale.
    """
    groups = places.groups()
    watched = [str(value.name) for value in places.values]
    by_name = {str(value.name): leader for leader, values in groups.items() for value in values}
    observers: dict[ir.Value, Observer] = {leader: observer() for leader in groups}
    session = _session(model, watched, folder)
    taken = {item.name for item in session.get_inputs()}
    calls: list[Call] = []
    count = 0
    for batch in batches:
        call = as_call(batch)
        arrays = [tensor.detach().cpu().numpy() for tensor in signature.bind(*call)]
        _finite_inputs(signature, arrays, count)
        for name, array in zip(watched, _run(session, signature, arrays, taken, watched, count), strict=True):
            if not np.isfinite(array).all():
                raise NumericError(
                    f"the activation {name!r} holds NaN or infinity on calibration batch {count}. Check the data's "
                    "normalisation and the model's weights."
                )
            observers[by_name[name]].update(array)
        if len(calls) < LOOKED_AT:
            calls.append(call)
        count += 1
        tell(count)
    if not count:
        raise DataError(
            "there is no calibration data: the iterable gave no batch. int8 needs a few hundred samples to see the "
            "ranges of the activations."
        )
    grids = {
        leader: from_range(*seen.range(), profile, str(leader.name), symmetric=leader in places.symmetric)
        for leader, seen in observers.items()
    }
    return grids, calls


def _session(model: ir.Model, watched: Sequence[str], folder: Path) -> Any:
    ort, onnx = need("int8 calibration", "onnxruntime", "onnx")
    function = ir.serde.deserialize_function(onnx.parser.parse_function(FUNCTION))
    graph = model.graph
    known = {str(value.name): value for node in graph for value in node.outputs} | {
        str(v.name): v for v in graph.inputs
    }
    before = list(graph.outputs)
    given = {str(value.name) for value in (*graph.inputs, *before)}
    file = folder / "calibration.onnx"
    try:
        graph.outputs.extend(known[name] for name in watched if name not in given)
        model.functions[function.identifier()] = function
        save_onnx(model, file)
    finally:
        model.functions.clear()
        while len(graph.outputs) > len(before):
            graph.outputs.pop()  # a deleted slice would leave the values marked as results
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with quiet():
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for written in folder.glob(f"{file.name}*"):
        written.unlink()
    return session


def _run(
    session: Any, signature: Signature, arrays: Sequence[Array], taken: set[str], watched: Sequence[str], number: int
) -> list[Array]:
    feed = {name: np.ascontiguousarray(a) for name, a in zip(signature.inputs, arrays, strict=True) if name in taken}
    given = dict(zip(signature.inputs, arrays, strict=True))
    wanted = [name for name in watched if name not in given] or [session.get_outputs()[0].name]
    try:
        found = dict(zip(wanted, session.run(wanted, feed), strict=True))
    except EspalierError:
        raise
    except Exception as error:
        raise DataError(
            f"the model does not run on calibration batch {number}: {first_line(error)} Calibration batches have the "
            "example's shapes; only the batch may differ, and only where the model leaves it open."
        ) from error
    return [given.get(name, found.get(name)) for name in watched]  # type: ignore[misc]


def _finite_inputs(signature: Signature, arrays: Sequence[Array], number: int) -> None:
    for name, array in zip(signature.inputs, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NumericError(f"the input {name!r} of calibration batch {number} holds NaN or infinity.")
        if array.ndim and not array.shape[0]:
            raise DataError(f"the input {name!r} of calibration batch {number} has no samples.")


def outputs(module: nn.Module, calls: Sequence[Call]) -> list[Array]:
    """What a module gives for ``calls``: every floating-point output, flat, in order."""
    found: list[Array] = []
    with evaluating(module):
        for args, kwargs in calls:
            found += [t.detach().cpu().numpy() for t in tensors_in(module(*args, **kwargs)) if t.is_floating_point()]
    return found
