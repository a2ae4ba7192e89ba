"""From a model in training form to the two files, and back: write, re-load, compare.

``model.espalier`` carries its architecture as a graph; ``model.weights.espalier`` is for receivers that know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import espalier.quantize  # noqa: F401 - plans name its methods
from espalier import encode
from espalier.core.context import Context
from espalier.core.errors import Corrupt, ModelError, PhaseError, UnknownNameError, UsageError, did_you_mean
from espalier.core.forms import Stored, dense_representation, from_numpy
from espalier.core.metric import Score, first_tensor
from espalier.core.model import copy_model, device_of, evaluating
from espalier.core.norms import Normalise
from espalier.core.parametrize import attach, plain, slots
from espalier.core.plan import Plan
from espalier.core.recipe import FileOptions
from espalier.core.representation import Dense, Representation
from espalier.core.task import Task, capture_call, to_device
from espalier.deploy.check import ROUNDED_DB, rounds, sqnr
from espalier.graph import Runner, dumps, loads, trace
from espalier.measure.frozen import file_length, frozen_weights

LARGEST_WEIGHED = 5_000_000
"""Parameters of the largest model whose file length is determined after every step."""

Tell = Callable[[int, int], None]
SELF_CONTAINED, WEIGHTS_ONLY = "model.espalier", "model.weights.espalier"
AGREE = {"fp32": 1e-3, "fp16": 0.1}
"""Largest difference of a re-loaded file's outputs, relative to the largest output; fp16 is judged by the metric."""


@dataclass(frozen=True)
class Frozen:
    """All that goes into a file: tensors, tied names, the plan a receiver replays, and the graph if there is one."""

    tensors: dict[str, Representation]
    aliases: dict[str, str]
    plan: Plan
    graph: Any | None
    refusal: str = ""


def freeze_model(model: nn.Module, task: Task | None) -> Frozen:
    """Freeze every weight, batch norms reduced to a scale and a shift, and trace the graph.

    Without a task, or where the trace fails, the graph is None and ``refusal`` says why.
    """
    weights = frozen_weights(model)
    tensors, aliases, plan = weights.tensors, weights.aliases, weights.plan
    if task is None:
        return Frozen(tensors, aliases, plan, None, "no task was given, so no example input to trace with")
    bare = plain(weights.model)
    try:
        args, kwargs = capture_call(task, bare, to_device(task.example(), torch.device("cpu")))
        graph = trace(bare, args, kwargs).without_statistics(weights.statistics)
    except ModelError as error:
        return Frozen(tensors, aliases, plan, None, str(error))
    constants = {name: dense_representation(value) for name, value in graph.constants.items()}
    return Frozen({**tensors, **constants}, aliases, plan, graph)


def write_self_contained(
    frozen: Frozen, path: Path, options: FileOptions, floats: str, progress: Tell | None = None
) -> Any:
    """Write ``frozen`` with its graph; returns the file's ``FileInfo``."""
    names = [*frozen.tensors, *frozen.aliases]
    blob = dumps(frozen.graph, names=names) if frozen.graph is not None else None
    return encode.write(
        path, frozen.tensors, aliases=frozen.aliases, graph=blob, plans=frozen.plan.to_json(),
        coders=options.coders, floats=floats, progress=progress,
    )  # fmt: skip


def write_weights(frozen: Frozen, path: Path, options: FileOptions, floats: str, progress: Tell | None = None) -> Any:
    """Write ``frozen`` for a receiver that knows the architecture; returns the file's ``FileInfo``."""
    constants = set(frozen.graph.constants) if frozen.graph is not None else set()
    tensors = {name: tensor for name, tensor in frozen.tensors.items() if name not in constants}
    return encode.write(
        path, tensors, aliases=frozen.aliases, plans=frozen.plan.to_json(), coders=options.coders, floats=floats,
        progress=progress,
    )  # fmt: skip


def load(path: str | Path, into: nn.Module | None = None, *, codes: bool = False, **limits: int) -> nn.Module:
    """The model in an .espalier file.

    Without ``into`` the architecture comes from the file (``model.espalier``). With ``into`` the receiver's
    structure is used: plans are replayed on it, its state is filled, and it is returned (or the graph that a plan puts
    in its place); nothing of it changes when the file does not fit. ``codes``: weights that the file stores as codes
    keep them in a form (``Stored``), so that an export can use the very same ones; they cannot be trained. ``limits``:
    ``max_elements``, ``max_bytes`` of what may be decoded.

    Raises a ``FileError`` for a damaged or forged file, ``UsageError`` for a file without a graph and no ``into``.
    """
    with encode.open_file(path, **limits) as archive:
        if into is not None:
            model = _fill(into, archive, path)
            return _with_codes(model, archive) if codes else model
        if archive.graph is None:
            raise UsageError(f"{path} holds weights only. Give the model it belongs to: load(path, into=model).")
        specs = {name: (archive.shape(name), archive.dtype(name)) for name in archive.keys()}  # noqa: SIM118 - an archive is no mapping
        specs |= {alias: specs[target] for alias, target in archive.aliases.items()}
        graph = loads(archive.graph, tensors=specs)
        tensors = {name: _tensor(archive, name) for name in archive.keys()}  # noqa: SIM118
        for alias, target in archive.aliases.items():
            tensors[alias] = tensors[target]
        model = Runner(graph, tensors).eval()
        return _with_codes(model, archive) if codes else model


def _with_codes(model: nn.Module, archive: Any) -> nn.Module:
    """Give every weight of two dimensions or more that is no plain tensor in the file the form it has there."""
    found = slots(model)
    for name in archive.keys():  # noqa: SIM118 - an archive is no mapping
        if name in found and found[name].latent.ndim >= 2:
            representation = archive.representation(name)
            if not isinstance(representation, Dense):
                attach(found[name], Stored(representation))
    return model


def _tensor(archive: Any, name: str) -> Tensor:
    representation = archive.representation(name)
    return from_numpy(np.array(representation.dense()), representation.dtype)


def _fill(model: nn.Module, archive: Any, path: str | Path) -> nn.Module:
    """Everything is decoded and checked before the first value of ``model`` changes."""
    plan = Plan.from_json(archive.plans)
    trial = _replayed(plan, copy_model(model), path) if plan.edits else model
    spared = {name for edit in plan.edits if isinstance(edit, Normalise) for name in edit.statistics(trial)}
    state = trial.state_dict(keep_vars=True)
    wanted = {name for name in state if name not in spared}
    offered = {name for name in (*archive.keys(), *archive.aliases) if not name.startswith("_constant.")}
    if wanted != offered:
        lacking, extra = sorted(wanted - offered), sorted(offered - wanted)
        raise UsageError(
            f"{path} does not fit {type(model).__name__}: "
            + (f"the file lacks {', '.join(lacking[:5])}" if lacking else f"the model has no {', '.join(extra[:5])}")
            + f".{did_you_mean(extra[0], state) if extra and not lacking else ''} Give the model it was made from."
        )
    values: dict[str, Tensor] = {}
    for name in sorted(wanted):
        value = _tensor(archive, archive.aliases.get(name, name))
        if value.shape != state[name].shape:
            raise UsageError(
                f"{path} does not fit {type(model).__name__}: {name} is {tuple(value.shape)} in the file and "
                f"{tuple(state[name].shape)} in the model."
            )
        values[name] = value
    model = plan.apply(model)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in values:
                tensor.copy_(values[name])
    return model


def _replayed(plan: Plan, model: nn.Module, path: str | Path) -> nn.Module:
    try:
        return plan.apply(model)
    except (ModelError, UnknownNameError, PhaseError) as error:
        raise UsageError(
            f"{path} does not fit {type(model).__name__}: {error} Give the model it was made from."
        ) from error


def disagreement(first: nn.Module, second: nn.Module, task: Task, allowed: float) -> float:
    """How far the two models' first output tensors are apart on the example batch, relative; 0.0 where they agree.

    Models that round their activations may break ties apart, each a whole step: they agree where the SQNR is
    ``ROUNDED_DB`` or more.
    """
    batch = task.example()
    with evaluating(first), evaluating(second):
        a, b = first_tensor(task.predict(first, batch)), first_tensor(task.predict(second, batch))
    far = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
    if far <= allowed or (rounds(second) and sqnr([b], [a]) >= ROUNDED_DB):
        return 0.0
    return far


@dataclass
class Written:
    """The two files as written, re-loaded and measured. ``model``: the re-loaded self-contained (or filled) model."""

    model: nn.Module
    floats: str
    val: Score | None
    files: dict[str, dict[str, Any]]


def write_files(model: nn.Module, original: nn.Module, context: Context, options: FileOptions, folder: Path) -> Written:
    """Write both files into ``folder``, re-load both, and measure the re-loaded ones on val.

    ``floats="auto"``: fp16 where the re-loaded file scores no worse on val than the fp32 one by more than a quarter
    of its standard error; the decision is noted. Raises ``Corrupt`` if a re-loaded file computes something else.
    """
    task = context.task
    frozen = freeze_model(model, task)
    if frozen.refusal:
        context.warn(
            f"the architecture does not travel: {frozen.refusal} model.espalier holds weights only; load it with into=."
        )
    floats = "fp32" if options.floats == "auto" else options.floats
    best = _write_both(frozen, original, context, options, folder, floats)
    if task is not None:
        _check_written(model, best, task)
    if options.floats == "auto" and best.val is not None and task is not None:
        narrow = _write_both(frozen, original, context, options, folder, "fp16")
        assert narrow.val is not None  # noqa: S101 - same task
        loss = task.scorer().drop(best.val, narrow.val)
        allowed = 0.25 * best.val.stderr
        if loss <= allowed:
            context.note(f"remaining floats stored as fp16: val moves by {-loss:+.3f}, {allowed:.3f} worse is allowed.")
            return narrow
        context.note(f"remaining floats stored as fp32: fp16 would cost {loss:.3f} on val, {allowed:.3f} is allowed.")
        best = _write_both(frozen, original, context, options, folder, "fp32")
    return best


def _check_written(model: nn.Module, written: Written, task: Task) -> None:
    """Raise ``Corrupt`` unless the re-loaded model computes what the model did before it was frozen."""
    difference = disagreement(written.model, plain(copy_model(model)).cpu(), task, AGREE[written.floats])
    if difference:
        raise Corrupt(
            f"the re-loaded file and the model it was written from disagree by {difference:.2g} (relative). Please "
            "report the model and the recipe; the checkpoint of the last step holds the model."
        )


def _write_both(
    frozen: Frozen, original: nn.Module, context: Context, options: FileOptions, folder: Path, floats: str
) -> Written:
    def tell(done: int, total: int) -> None:
        context.progress(f"writing, {floats}", done, total)

    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        SELF_CONTAINED: write_self_contained(frozen, folder / SELF_CONTAINED, options, floats, tell),
        WEIGHTS_ONLY: write_weights(frozen, folder / WEIGHTS_ONLY, options, floats, tell),
    }
    filled = load(folder / WEIGHTS_ONLY, into=copy_model(original).cpu()).eval()
    model = load(folder / SELF_CONTAINED) if frozen.graph is not None else filled
    task, scores = context.task, {}
    if task is not None and frozen.graph is not None:
        difference = disagreement(model, filled, task, AGREE["fp32"])
        if difference:
            raise Corrupt(
                f"the two re-loaded files disagree by {difference:.2g} (relative); the graph of this model is not "
                "reproduced faithfully. Please report the model; meanwhile use model.weights.espalier with into=."
            )
    if task is not None and task.val is not None:
        place = device_of(original)
        for name, loaded in ((SELF_CONTAINED, model), (WEIGHTS_ONLY, filled)):
            scores[name] = context.measure(loaded.to(place))
            loaded.cpu()
    files = {
        name: {"bytes": (folder / name).stat().st_size, "verified": True, "info": info.to_json()}
        for name, info in infos.items()
    }
    for name, score in scores.items():
        files[name]["metric"] = {"val": vars(score)}
    return Written(model, floats, scores.get(SELF_CONTAINED), files)


def encoded_length(model: nn.Module, context: Context, options: FileOptions) -> int | None:
    """Length of the weights-only file this state would be written to now; None where it cannot be said cheaply."""
    if sum(p.numel() for p in model.parameters()) > LARGEST_WEIGHED:
        return None
    return file_length(model, context, options.coders)
