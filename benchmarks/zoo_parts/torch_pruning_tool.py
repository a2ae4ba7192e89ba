"""torch-pruning's side of the comparison, as a user without knowledge of the network would call it.

BasePruner with GroupMagnitudeImportance(p=2), local ranking, the same ratio everywhere, no num_heads, no channel
groups, no customised pruners. Ignored is what its readme tells everybody to ignore: every Linear and Conv2d with as
many outputs as the model has classes (the channels of the model's output); where there is none, the last Linear or
Conv2d by name. A ratio is not a budget, so the ratio is searched for half the parameters: at most 8 tries, each from
a fresh copy, within the time limit; the closest that runs is judged.

The masked reference is the original with the inputs of every consumer zeroed at the channels that were removed, and
with LayerNorm and GroupNorm taking their statistics over the kept channels only.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.zoo_parts.checks import (
    BUDGET,
    EXACT,
    Row,
    attempt,
    common_checks,
    late_checks,
    output_of,
    parameters_of,
    within,
)
from benchmarks.zoo_parts.models import first_tensor, relative
from torch import Tensor, nn

TRIES, FIRST, CLOSE = 8, 0.3, 0.005
_CONV = nn.modules.conv._ConvNd
_NORM = (nn.LayerNorm, nn.GroupNorm)


@dataclass
class Trial:
    """One pruning: the copy, its ratio, and which input channels of which layers were removed (original numbers)."""

    model: nn.Module
    ratio: float
    alive: dict[str, list[int]] = field(default_factory=dict)
    runs: bool = False
    kept: float = 1.0


def ignored(model: nn.Module, classes: int) -> list[str]:
    """Names of the layers a user without hints leaves alone."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, _CONV))}
    outputs = {name: m.out_features if isinstance(m, nn.Linear) else m.out_channels for name, m in layers.items()}
    found = [name for name, count in outputs.items() if count == classes]
    return found or list(layers)[-1:]


def prune_once(model: nn.Module, x: Tensor, ratio: float, leave: list[str]) -> Trial:
    """A copy of ``model`` pruned at ``ratio``, every removal recorded."""
    import torch_pruning as tp

    trial = Trial(copy.deepcopy(model), ratio)
    modules = dict(trial.model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    pruner = tp.pruner.BasePruner(
        trial.model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
        ignored_layers=[modules[name] for name in leave],
        in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},  # its defaults are shared dicts
    )  # fmt: skip
    for group in pruner.step(interactive=True):
        removals = [(dep.target.module, dep.handler, list(indices)) for dep, indices in group]
        group.prune()
        for module, handler, indices in removals:
            _record(trial, names.get(id(module), ""), module, handler, indices)
    trial.kept = parameters_of(trial.model) / parameters_of(model)
    return trial


def _record(trial: Trial, name: str, module: nn.Module, handler: Any, indices: list[int]) -> None:
    """Indices are relative to what is left; keep the original numbers of what is left."""
    consumer = getattr(handler, "__name__", "") == "prune_in_channels" and isinstance(module, (nn.Linear, _CONV))
    if not name or not (consumer or isinstance(module, _NORM)):
        return
    size = _width(module)
    gone = set(indices)
    if name not in trial.alive:
        trial.alive[name] = list(range(size + len(gone)))
    trial.alive[name] = [number for k, number in enumerate(trial.alive[name]) if k not in gone]


def _width(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return module.num_channels if isinstance(module, nn.GroupNorm) else module.in_channels  # type: ignore[union-attr,return-value]


def prune(row: Row, model: nn.Module, x: Tensor, seconds: float) -> Trial:
    """Search the ratio for half the parameters; raises what the tool raised when no try gave a model."""
    started, busy = time.perf_counter(), time.process_time()
    expected = output_of(model, x)
    leave = ignored(model, int(first_tensor(expected).shape[1]))
    row["ignored"] = leave
    low, high, ratio = (0.0, 1.0), (1.0, 0.0), FIRST
    best: Trial | None = None
    failure: Exception | None = None
    tries = row["tries"] = []
    for number in range(TRIES):
        spent = time.perf_counter() - started
        if number and spent * (number + 1) / number > seconds:
            row["reasons"]["tries"] = f"stopped after {number} tries: another would pass the limit of {seconds:.0f} s"
            break
        try:
            trial = prune_once(model, x, ratio, leave)
        except Exception as error:
            failure = error
            tries.append([round(ratio, 4), f"{type(error).__name__}: {str(error)[:120]}"])
            ratio = {0: 0.5, 1: 0.25}.get(number, 0.0)
            if best is not None or not ratio:
                break
            continue
        trial.runs = _runs(trial.model, x)
        tries.append([round(ratio, 4), round(trial.kept, 4)])
        if best is None or (trial.runs, -abs(trial.kept - 0.5)) > (best.runs, -abs(best.kept - 0.5)):
            best = trial
        if abs(trial.kept - 0.5) <= (CLOSE if number < 3 else BUDGET):
            break
        if trial.kept > 0.5:
            low = (ratio, trial.kept)
        else:
            high = (ratio, trial.kept)
        middle = (low[0] + high[0]) / 2
        straight = low[0] + (high[0] - low[0]) * (low[1] - 0.5) / max(low[1] - high[1], 1e-9)
        ratio = straight if number % 3 != 2 else middle
    row["seconds"]["prune"] = round(time.perf_counter() - started, 2)
    row["seconds"]["prune_cpu"] = round(time.process_time() - busy, 2)
    row["seconds"]["one_try"] = round(row["seconds"]["prune"] / max(len(tries), 1), 2)
    row["seconds"]["one_try_cpu"] = round(row["seconds"]["prune_cpu"] / max(len(tries), 1), 2)
    if best is None:
        raise failure or RuntimeError("no try finished")
    return best


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        output_of(model, x)
    except Exception:
        return False
    return True


def check(row: Row, model: nn.Module, trial: Trial, x: Tensor) -> None:
    """All assertions on the best try."""
    row["ratio"] = round(trial.ratio, 4)
    runs = common_checks(row, model, trial.model, x)
    row["ok"]["boundaries_listed"] = None  # nothing of the kind is offered
    if runs:
        attempt(row, "masked_reference", lambda: _equals_masked(row, model, trial, x))
        attempt(row, "saved", lambda: within(row, "saved", _saved_and_loaded(row, trial.model, x), EXACT))
        late_checks(row, model, trial.model, x)


def _equals_masked(row: Row, model: nn.Module, trial: Trial, x: Tensor) -> bool:
    masked = masked_reference(model, trial)
    return within(row, "masked_reference", relative(output_of(trial.model, x), output_of(masked, x)), EXACT)


def masked_reference(model: nn.Module, trial: Trial) -> nn.Module:
    """A copy of the original that ignores the removed channels (see the head of this file)."""
    masked = copy.deepcopy(model)
    modules, pruned = dict(masked.named_modules()), dict(trial.model.named_modules())
    for name, alive in trial.alive.items():
        module = modules[name]
        index = torch.tensor(alive, dtype=torch.long)
        if isinstance(module, _NORM):
            parent, _, last = name.rpartition(".")
            setattr(modules[parent] if parent else masked, last, KeptNorm(pruned[name], index, _width(module)))
        else:
            mask = torch.zeros(_width(module)).index_fill_(0, index, 1.0)
            axis = -1 if isinstance(module, nn.Linear) else 1
            module.register_forward_pre_hook(_zeroing(mask, axis))
    return masked


def _zeroing(mask: Tensor, axis: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        view = [1] * x.dim()
        view[axis] = -1
        return (x * mask.view(view), *args[1:])

    return hook


class KeptNorm(nn.Module):
    """A norm over the kept channels; the others come out as zeros."""

    def __init__(self, norm: nn.Module, index: Tensor, width: int) -> None:
        super().__init__()
        self.norm, self.width = copy.deepcopy(norm), width
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        first = isinstance(self.norm, nn.GroupNorm) or "2d" in type(self.norm).__name__
        axis = 1 if first else x.dim() - 1
        if x.shape[axis] != self.width:
            raise RuntimeError(f"the channels of {tuple(x.shape)} are not where the reference expects them")
        kept = self.norm(x.index_select(axis, self.index))
        return torch.zeros_like(x).index_copy(axis, self.index, kept)


def _saved_and_loaded(row: Row, pruned: nn.Module, x: Tensor) -> float:
    """Its own way: the pickled model, which needs the classes and trust to load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(pruned, path)
        row["file_bytes"] = path.stat().st_size
        return relative(output_of(torch.load(path, weights_only=False), x), output_of(pruned, x))
